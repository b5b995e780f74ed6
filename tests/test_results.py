import dataclasses
import json

import pandas as pd
import pytest

from mrl.config import HeadConfig
from mrl.errors import UserError
from mrl.results import Source, method_name, read_rows, text_table, write_rows

SOURCE = Source("digits", "run_a", 3, 32, 28, False)
SEARCH = {"shortlist_dim": 8, "shortlist_size": 200, "cost": 10.24, "ms_per_query": 0.5}
ROWS = [
    SOURCE.row("classification", "MRL", "top_1", 1 / 3, 360, dim=8),
    SOURCE.row("adaptive_retrieval", "MRL", "map@10", 1.0, 360, **SEARCH),
    dataclasses.replace(SOURCE, run="läufe/b", flip=True).row("classification", "FF", "top_1", 0.0, 1, dim=2048),
]


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (([8, 16], {}), "MRL"),
        (([8, 16], {"tied": True}), "MRL-E"),
        (([16], {}), "FF"),
        (([16], {"tied": True, "weights": [2.0], "self_distillation": 1}), "FF"),
        (([8, 16], {"weights": [2.0, 1.0]}), "MRL weighted"),
        (([8, 16], {"tied": True, "self_distillation": 1}), "MRL-E distilled"),
        (([8, 16], {"tied": True, "scaled": True}), "MRL-E scaled"),
    ],
)
def test_the_method_follows_from_the_sizes_the_tie_and_the_loss(head, name):
    assert method_name(head[0], HeadConfig(**head[1])) == name


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


def test_a_source_gives_its_fields_to_every_row_and_nothing_else():
    given = dataclasses.asdict(SOURCE) | SEARCH
    given |= {"study": "adaptive_retrieval", "method": "MRL", "metric": "map@10", "value": 1.0, "n": 360}
    assert {name: value for name, value in vars(ROWS[1]).items() if value is not None} == given


@pytest.mark.parametrize("value", [-0.1, 66.63, float("nan")])
def test_a_value_that_is_not_a_share_is_refused_but_a_cosine_may_be_negative(value):
    with pytest.raises(UserError, match="from 0 to 1"):
        SOURCE.row("classification", "MRL", "top_1", value, 360, dim=8)
    assert SOURCE.row("similarity", "MRL", "cosine_random", -0.5, 360, dim=8).value == -0.5
    with pytest.raises(UserError, match="from -1 to 1"):
        SOURCE.row("similarity", "MRL", "cosine_random", -1.1, 360, dim=8)


def changed(**changes):
    row = dataclasses.asdict(ROWS[0]) | changes
    return json.dumps({key: value for key, value in row.items() if value != "gone"})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (changed(accuracy=0.5, zest=1), "line 2 .* unexpected keyword argument 'accuracy'"),
        (changed(n="gone", seed="gone"), "line 2 .* missing .* 'n' and 'seed'"),
        (changed(value="0.5"), "is '0.5'; allowed"),
        (changed(value=50.0), "from 0 to 1"),
        (changed()[:40], "line 2 is not a row"),
        ("[1, 2]", "list"),
        ("\udc89PNG", "line 2 is not a row"),
    ],
)
def test_a_line_that_is_not_a_row_is_refused_with_its_number(tmp_path, line, said):
    path = tmp_path / "results.jsonl"
    write_rows(ROWS[:1], path)
    path.write_text(path.read_text() + line + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=said) as error:
        read_rows(path)
    assert "line 2" in str(error.value)


def test_rows_written_before_a_column_existed_have_none_in_it(tmp_path):
    (tmp_path / "results.jsonl").write_text(changed(code="gone", bytes="gone") + "\n")
    assert read_rows(tmp_path / "results.jsonl") == ROWS[:1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("group", "class"), "must be a table with .* it has .*class"),
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


def test_there_is_a_table_per_dataset_study_and_metric_with_a_line_per_run_and_a_column_per_size():
    models = {("FF", "ff8"): {8: 0.5}, ("MRL", "mrl"): {16: 1.0, 8: 0.98765, 2048: 0}}
    rows = [
        dataclasses.replace(SOURCE, run=run).row("classification", method, "top_1", value, 360, dim=dim)
        for (method, run), of_dims in models.items()
        for dim, value in of_dims.items()
    ]
    title, *lines = text_table(rows).splitlines()
    assert title == "digits: classification, top_1 (%), n = 360"
    assert [line.split() for line in lines] == [
        ["8", "16", "2048"],
        ["method", "run"],
        ["MRL", "mrl", "98.77", "100.00", "0.00"],
        ["FF", "ff8", "50.00", "-", "-"],
    ]
    others = [{"dataset": "tiny_imagenet"}, {"study": "retrieval"}, {"metric": "top_5"}]
    assert text_table([*rows, *(dataclasses.replace(rows[0], **other) for other in others)]).count("n = 360") == 4
