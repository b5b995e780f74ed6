"""Notebooks hold no logic, are small and clean, and run on a freshly trained pair of runs."""

import ast
import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation  # not `eval`, which is Python's own
import train as training

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
assert NAMES == ["adaptive_deployment", "coarse_to_fine", "geometry", "what_a_prefix_knows"]
LOGIC: tuple[type, ...] = (ast.FunctionDef, ast.Lambda, ast.ClassDef, ast.For, ast.While, ast.If, ast.IfExp, ast.Try)
LOGIC += (ast.With, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp, ast.BinOp)
MAX_STATEMENTS = 5
TINY = [
    *("--config", "digits_mrl.yaml", "--model.backbone", "test_resnet", "--model.stem_stride", "2"),
    *(
        "--model.kwargs",
        "{}",
        "--train.epochs",
        "2",
        "--optim.lr",
        "0.05",
        "--optim.warmup_epochs",
        "0.2",
        "--head.nesting_list",
    ),
]


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def code(cell):
    return "".join(line for line in cell["source"] if not line.startswith("%"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_cells_call_the_package_and_hold_no_logic(path):
    for cell in cells(path, "code"):
        tree = ast.parse(code(cell))
        statements = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert len(statements) <= MAX_STATEMENTS, code(cell)
        # 1000 * milliseconds in a printed sentence is no logic.
        sums = {id(node) for f in ast.walk(tree) if isinstance(f, ast.JoinedStr) for node in ast.walk(f)}
        logic = [node for node in ast.walk(tree) if isinstance(node, LOGIC) and id(node) not in sums]
        assert not logic, ast.unparse(logic[0])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_is_kept_is_small_executed_and_of_no_machine(path):
    text = path.read_text()
    assert path.stat().st_size < 300_000
    assert not re.search(r"/(home|tmp|Users|root|mnt)/|[A-Z]:\\\\", text)
    executed = cells(path, "code")
    assert [cell["execution_count"] for cell in executed] == list(range(1, len(executed) + 1))
    outputs = [output for cell in executed for output in cell["outputs"]]
    assert sum(bool({"image/png", "image/jpeg"} & {*output.get("data", {})}) for output in outputs) >= 2
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert json.loads(text)["metadata"].keys() == {"kernelspec", "language_info"}


def test_sentences_in_notebooks_are_of_no_data_set():
    for path in NOTEBOOKS:
        prose = " ".join("".join(cell["source"]) for cell in cells(path, "markdown"))
        named = re.sub(r"`[^`]*`", "", prose)
        assert not re.search(r"\b(digits?|seed|ten|here are for|\d+%)\b", named.replace("more than ten", "")), path


def test_photographs_become_jpeg_and_lines_stay_png():
    pytest.importorskip("nbclient")
    from notebooks.execute import shrink

    rng = np.random.default_rng(0)
    noise, flat = rng.integers(256, size=(400, 500, 3), dtype=np.uint8), np.zeros((400, 500, 3), dtype=np.uint8)
    for pixels, kind in ((noise, "image/jpeg"), (flat, "image/png")):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        [(found, data)] = shrink(base64.b64encode(file.getvalue()).decode()).items()
        assert found == kind and Image.open(io.BytesIO(base64.b64decode(data))).size == (500, 400)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """MRL and FF, each trained for two epochs of digits, their images embedded by eval.py."""
    folder = tmp_path_factory.mktemp("runs")
    for name, dims in (("mrl", "[8, 16, 32, 96]"), ("ff", "[96]")):
        assert training.main([*TINY, dims, "--run.name", name, "--run.dir", str(folder)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "run_studies", lambda *_, **__: [])  # the notebooks need no rows
        runs_and_title = ["--runs", str(folder / "mrl"), str(folder / "ff"), "--title", "my digits"]
        assert evaluation.main(runs_and_title) == 0
    return folder


def test_an_evaluation_draws_neighbors_among_the_runs_own_images_and_its_confusions(runs):
    names = {path.name for path in (runs / "eval").iterdir()}
    assert {"neighbors_digits.png", "confusions_digits.png"} <= names
    assert Image.open(runs / "eval" / "neighbors_digits.png").size[0] > 1000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_runs_on_other_runs_and_draws(path, runs, tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from notebooks.execute import execute

    environment = {"MRL_RUN": str(runs / "mrl"), "MRL_OTHER_RUN": str(runs / "ff"), "MRL_MAX_IMAGES": "60"}
    environment["MRL_TITLE"] = "my digits"
    target = tmp_path / path.name
    execute(path, target, environment)
    before, after = (
        [sorted(o.get("data", {})) for cell in cells(p, "code") for o in cell["outputs"]] for p in (path, target)
    )
    assert after == before
    printed = "".join(text for cell in cells(target, "code") for o in cell["outputs"] for text in o.get("text", []))
    assert "mrl: MRL of test_resnet on my digits, sizes 8, 16, 32, 96" in printed
    assert str(REPOSITORY) not in target.read_text()
