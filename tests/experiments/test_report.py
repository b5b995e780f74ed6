import json
import re

import pytest

from experiments import report
from experiments.report import DOCUMENTS, RESULTS, main, write_report
from mrl.errors import UserError
from mrl.results import Source, read_rows, write_rows

RUN = {
    **{"recipe": "tiny_imagenet_mrl", "settings": "--train.epochs 2", "seed": 0, "hardware": "a CPU"},
    **{"images_per_second": 1234.5, "data_wait": 0.01, "seconds": 3660.0, "torch": "2.14.1"},
    **{"git_commit": "0123456789abcdef", "git_dirty": None},  # None: not known, as without git
}
FF = RUN | {"recipe": "ff", "settings": "--train.epochs 2 --data.train_px [[0, 32], [3, 48]]", "seconds": 100.0}
DOCUMENT = """# Title
<!-- results: summary main of grid b -->
typed by hand
<!-- end of results -->
between
<!-- results: tables other of grid a -->
<!-- end of results -->
"""


@pytest.fixture
def results(tmp_path):
    """Three seeds of MRL and FF at 8 and 64 dims; at 8 dims MRL leads by 1, 2 and 3 points."""
    rows = []
    for seed in range(3):
        for study in ("classification", "retrieval"):
            for method, values in (("MRL", {8: 0.51 + 0.01 * seed, 64: 0.6}), ("FF", {8: 0.5, 64: 0.6})):
                for dim, value in values.items():
                    run = f"mrl_seed{seed}" if method == "MRL" else f"ff{dim}_seed{seed}"
                    source = Source("tiny", run, seed, 64, 64, flip=False)
                    rows.append(source.row(study, method, "top_1", value, 5000, dim=dim))
    folder = tmp_path / "results" / "main"
    folder.mkdir(parents=True)
    write_rows(rows, folder / "results.jsonl")
    record = {
        "title": "Tiny things",
        "evaluation": {},
        "runs": {"mrl_seed0": RUN, "ff8_seed0": FF, "ff8_seed1": FF | {"seed": 1}},
    }
    (folder / "provenance.json").write_text(json.dumps(record))
    return tmp_path / "results"


def cells(text, *start):
    [line] = [line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_hold_hand_worked_means_deviations_and_verdicts(results):
    write_report(results, ())
    text = (results / "main" / "tables.md").read_text()
    linear = text.split("### 1-NN")[0]
    assert cells(linear, "MRL") == ["MRL", "52.00 ± 1.00", "60.00 ± 0.00", "3"]
    assert cells(linear, "FF (one model per size)")[1:] == ["50.00 ± 0.00", "60.00 ± 0.00", "3"]
    # 2 points with a standard deviation of 1: t of 2 degrees of freedom, 4.3027, over sqrt(3) is 2.48 to both sides.
    assert cells(text, "E1", "8 dims")[2:] == [
        "+2.00 ± 1.00", "-0.48 to +4.48", "3", "at least -0.50", "+1.34", "holds",
    ]  # fmt: skip
    gain = cells(text, "E2", "gain at 8 dims minus gain at 64 dims")
    assert (gain[3], gain[7]) == ("-0.48 to +4.48", "undecided")
    assert re.search(r"\| E1 \| MRL is .* \| holds \|\n", text) and re.search(r"\| E3 \| .* \| not measured", text)
    assert "on a CPU, 1 h 04 min of training; 5,000 validation images of tiny." in text
    assert "All runs: `--train.epochs 2`" in text
    assert cells(text, "tiny_imagenet_mrl") == [
        "tiny_imagenet_mrl", "0", "1,234", "1 h 01 min", "a CPU", "2.14.1", "0123456",
    ]  # fmt: skip
    assert cells(text, "ff --data.train_px [[0, 32], [3, 48]]")[1:4] == ["0, 1", "1,234", "100 s"]
    assert (results / "main" / "accuracy_by_dim_tiny.png").stat().st_size > 1000


def test_check_writes_nothing_and_finds_what_would_change(results, capsys):
    assert main(["--results", str(results)]) == 0
    before = (results / "main" / "tables.md").read_text()
    assert main(["--results", str(results), "--check"]) == 0
    (results / "main" / "tables.md").write_text(before.replace("52.00", "53.00"))
    capsys.readouterr()
    assert main(["--results", str(results), "--check"]) == 1
    assert "would change" in capsys.readouterr().out
    assert "53.00" in (results / "main" / "tables.md").read_text()


def test_the_committed_rows_give_the_committed_tables_and_documents():
    assert write_report(RESULTS, DOCUMENTS, check=True) == []
    for path in DOCUMENTS:
        assert report.SECTION.search(path.read_text()), f"{path} shows no results"


def test_the_marked_parts_of_a_document_are_replaced(results, tmp_path):
    document = tmp_path / "docs" / "README.md"
    document.parent.mkdir()
    document.write_text(DOCUMENT)
    assert write_report(results, [document]) == [results / "main" / "tables.md", document]
    text = document.read_text()
    assert (
        text.startswith("# Title\n<!-- results: summary main of grid b -->\n| linear top-1 (%), by dims |")
        and "52.00 ± 1.00" in text
    )
    assert "[All tables](../results/main/tables.md)" in text
    assert "claims about plain MRL: E1: holds; E2: holds or undecided; E3" in text
    assert "typed by hand" not in text and "\nbetween\n" in text
    assert "Not run yet: `python -m experiments.reproduce --grid a`" in text
    assert write_report(results, [document]) == []
    document.write_text(DOCUMENT.replace("<!-- end of results -->\nbetween", "between"))
    with pytest.raises(UserError, match="needs its <!-- end of results -->"):
        write_report(results, [document])
    (results / "main" / "provenance.json").write_text('{"runs": {"a": "runs/a"}}')
    with pytest.raises(UserError, match="main holds an evaluation, not results that"):
        write_report(results, [])
    (results / "main" / "provenance.json").unlink()
    with pytest.raises(OSError, match=r"provenance\.json"):
        write_report(results, [])


@pytest.mark.parametrize("method", ["MRL", "FF"])
def test_models_that_differ_in_more_than_the_seed_are_separate_lines_and_give_no_effects(results, method):
    path = results / "main" / "results.jsonl"
    source = Source("tiny", "weighted_seed0", 0, 64, 64, flip=False)
    write_rows([*read_rows(path), source.row("classification", method, "top_1", 0.55, 5000, dim=8)], path)
    write_report(results, ())
    text = (results / "main" / "tables.md").read_text()
    assert ": weighted_seed0 | 55.00 |" in text.split("### 1-NN")[0]
    assert "### Effects" not in text
