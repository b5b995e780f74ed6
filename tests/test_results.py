import dataclasses
import json

import pandas as pd
import pytest

from mrl.errors import UserError
from mrl.results import Source, method_name, read_rows, text_table, write_rows

SOURCE = Source("digits", "run_a", 3, 32, 28, False)
ROWS = [
    SOURCE.row("classification", "MRL", "top_1", 1 / 3, 360, dim=8),
    SOURCE.row("adaptive_retrieval", "MRL", "map@10", 1.0, 360, shortlist_dim=8, shortlist_size=200, cost=10.24),
    dataclasses.replace(SOURCE, run="läufe/b", flip=True).row("classification", "FF", "top_1", 0.0, 1, dim=2048),
]


@pytest.mark.parametrize(
    ("nesting_list", "tied", "weights", "name"),
    [
        ([8, 16], False, None, "MRL"),
        ([8, 16], True, None, "MRL-E"),
        ([16], False, None, "FF"),
        ([16], True, [2.0], "FF"),
        ([8, 16], False, [2.0, 1.0], "MRL weighted"),
    ],
)
def test_the_method_follows_from_the_sizes_the_tie_and_the_weights(nesting_list, tied, weights, name):
    assert method_name(nesting_list, tied, weights) == name


CLASS_NAMES = ["1", "NA", "true", 'a, "b"\nc', "naïve"]


def test_rows_come_back_as_they_were_written_and_those_of_classes_from_a_table_of_their_own(tmp_path):
    path = tmp_path / "results.jsonl"
    of_classes = [SOURCE.row("per_class", "MRL", "top_1", 1 / 3, 7, dim=8, group=name) for name in CLASS_NAMES]
    trend = SOURCE.row("per_class", "MRL", "share_of_classes", 0.25, 4, group="monotone")
    write_rows([*ROWS, *of_classes, trend], path)
    assert read_rows(path) == [*ROWS, trend, *of_classes]
    assert len(path.read_text().splitlines()) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["classes.csv", "results.jsonl"], "no temporary"
    assert pd.read_csv(tmp_path / "classes.csv")["group"].tolist()[3] == CLASS_NAMES[3]
    write_rows(ROWS, path)
    assert read_rows(path) == ROWS, "no class of earlier rows stays"


@pytest.mark.parametrize("value", [-0.1, 1.1, 66.63, float("nan")])
def test_a_value_that_is_not_a_share_is_refused(value):
    with pytest.raises(UserError, match="from 0 to 1"):
        SOURCE.row("classification", "MRL", "top_1", value, 360, dim=8)


def test_a_cosine_may_be_negative_but_no_less_than_minus_1():
    assert SOURCE.row("similarity", "MRL", "cosine_random", -0.5, 360, dim=8).value == -0.5
    with pytest.raises(UserError, match="from -1 to 1"):
        SOURCE.row("similarity", "MRL", "cosine_random", -1.1, 360, dim=8)


def changed(**changes):
    row = dataclasses.asdict(ROWS[0]) | changes
    return json.dumps({key: value for key, value in row.items() if value != "gone"})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (changed(accuracy=0.5), "unexpected keyword argument 'accuracy'"),
        (changed(n="gone", seed="gone"), "missing 2 .* 'n' and 'seed'"),
        (changed(value="0.5"), "is '0.5'; allowed are values from 0 to 1"),
        (changed(value=50.0), "from 0 to 1"),
        (changed()[:40], "Unterminated string"),
        ("[1, 2]", "list"),
    ],
)
def test_a_line_that_is_not_a_row_is_refused_with_its_number(tmp_path, line, said):
    path = tmp_path / "results.jsonl"
    write_rows(ROWS[:1], path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=f"results.jsonl, line 2 is not a row: .*{said}"):
        read_rows(path)
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        read_rows(tmp_path / "none.jsonl")


def test_rows_written_before_a_column_existed_have_none_in_it(tmp_path):
    (tmp_path / "results.jsonl").write_text(changed(code="gone", bytes="gone") + "\n")
    assert read_rows(tmp_path / "results.jsonl") == ROWS[:1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("group", "class"), "but it has .*class"),
        (lambda text: text.replace("0.5", "half"), "half"),
        (lambda text: text.replace("0.5", "50"), "from 0 to 1"),
    ],
)
def test_a_class_table_that_holds_no_rows_is_refused(tmp_path, change, said):
    write_rows([SOURCE.row("per_class", "MRL", "top_1", 0.5, 7, dim=8, group="cat")], tmp_path / "results.jsonl")
    table = tmp_path / "classes.csv"
    table.write_text(change(table.read_text()))
    with pytest.raises(UserError, match=said):
        read_rows(tmp_path / "results.jsonl")


def test_the_table_has_a_line_per_run_and_a_column_per_size():
    def rows(method, run, of_dims):
        source = dataclasses.replace(SOURCE, run=run)
        return [source.row("classification", method, "top_1", value, 360, dim=dim) for dim, value in of_dims.items()]

    table = text_table([*rows("FF", "ff8", {8: 0.5}), *rows("MRL", "mrl", {16: 1.0, 8: 0.98765, 2048: 0})])
    title, *lines = table.splitlines()
    assert title == "digits: classification, top_1 (%), n = 360"
    assert [line.split() for line in lines] == [
        ["8", "16", "2048"],
        ["method", "run"],
        ["MRL", "mrl", "98.77", "100.00", "0.00"],
        ["FF", "ff8", "50.00", "-", "-"],
    ]
