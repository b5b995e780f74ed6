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
TINY = ["--config", "digits_mrl.yaml", "--model.backbone", "test_resnet", "--model.stem_stride", "2"]
TINY += ["--model.kwargs", "{}", "--train.epochs", "2", "--optim.lr", "0.05", "--optim.warmup_epochs", "0.2"]


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def kinds_of(outputs):
    """The kinds of data in each output; photographs are JPEG, and messages may come in parts."""
    kinds = [sorted(kind.replace("jpeg", "png") for kind in output.get("data", {})) for output in outputs]
    return [kind for kind in kinds if kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_cells_call_the_package_and_hold_no_logic(path):
    for cell in cells(path, "code"):
        code = "".join(line for line in cell["source"] if not line.startswith("%"))
        tree = ast.parse(code)
        statements = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert len(statements) <= MAX_STATEMENTS, code
        # 1000 * milliseconds in a printed sentence is no logic.
        sums = {id(node) for f in ast.walk(tree) if isinstance(f, ast.JoinedStr) for node in ast.walk(f)}
        logic = [node for node in ast.walk(tree) if isinstance(node, LOGIC) and id(node) not in sums]
        assert not logic, ast.unparse(logic[0])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_is_kept_is_small_executed_of_no_machine_and_its_prose_of_no_data_set(path):
    text = path.read_text()
    assert path.stat().st_size < 1_200_000
    assert not re.search(r"/(home|tmp|Users|root|mnt)/|[A-Z]:\\\\", text)
    executed = cells(path, "code")
    assert [cell["execution_count"] for cell in executed] == list(range(1, len(executed) + 1))
    outputs = [output for cell in executed for output in cell["outputs"]]
    assert sum(bool({"image/png", "image/jpeg"} & {*output.get("data", {})}) for output in outputs) >= 2
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert json.loads(text)["metadata"].keys() == {"kernelspec", "language_info"}
    prose = " ".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    named = re.sub(r"`[^`]*`|more than ten", "", prose)
    assert not re.search(r"\b(digits?|seed|ten|here are for|\d+%)\b", named)


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


def test_they_run_on_other_runs_and_draw(tmp_path, monkeypatch):
    """All in one kernel, which forgets its names between two notebooks: starting one takes seconds."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from notebooks.execute import execute

    runs = [tmp_path / "mrl", tmp_path / "ff"]
    for run, dims in zip(runs, ("[8, 16, 32, 96]", "[96]"), strict=True):
        argv = [*TINY, "--head.nesting_list", dims, "--run.name", run.name, "--run.dir", str(tmp_path)]
        assert training.main(argv) == 0
    monkeypatch.setattr(evaluation, "run_studies", lambda *_, **__: [])  # the notebooks need no rows
    assert evaluation.main(["--runs", *map(str, runs), "--title", "my digits"]) == 0
    assert Image.open(tmp_path / "eval" / "neighbors_digits.png").size[0] > 1000
    assert (tmp_path / "eval" / "confusions_digits.png").is_file()

    joined = nbformat.v4.new_notebook()
    for path in NOTEBOOKS:
        joined.cells += [nbformat.v4.new_code_cell("%reset -f"), *nbformat.read(path, as_version=4).cells]
    for number, cell in enumerate(joined.cells):
        cell["id"] = str(number)
    nbformat.write(joined, tmp_path / "joined.ipynb")
    environment = {"MRL_RUN": str(runs[0]), "MRL_OTHER_RUN": str(runs[1]), "MRL_MAX_IMAGES": "60"}
    execute(tmp_path / "joined.ipynb", tmp_path / "done.ipynb", environment | {"MRL_TITLE": "my digits"})
    done = [cell for cell in cells(tmp_path / "done.ipynb", "code") if "".join(cell["source"]) != "%reset -f"]
    before = [cell for path in NOTEBOOKS for cell in cells(path, "code")]
    for old, new in zip(before, done, strict=True):
        assert kinds_of(new["outputs"]) == kinds_of(old["outputs"])
    printed = "".join(text for cell in done for output in cell["outputs"] for text in output.get("text", []))
    assert printed.count("mrl: MRL of test_resnet on my digits, sizes 8, 16, 32, 96") >= len(NOTEBOOKS)
    assert str(REPOSITORY) not in (tmp_path / "done.ipynb").read_text()


def test_options_become_variables_that_the_notebooks_read_with_absolute_paths(tmp_path, monkeypatch):
    import notebooks.execute as module

    given = []

    def execute(source, target, environment):
        given.append(environment)
        target.touch()

    monkeypatch.setattr(module, "execute", execute)
    options = {"run": "a", "other_run": "b", "superclasses": "t", "pictures": "p", "credit": "me", "title": "mine"}
    argv = [word for key, value in options.items() for word in (f"--{key}", value)]
    monkeypatch.setattr("sys.argv", ["execute", *argv, "--out", str(tmp_path)])
    module.main()
    sources = [*NOTEBOOKS, *(REPOSITORY / "mrl").rglob("*.py")]
    read = set(re.findall(r"MRL_[A-Z_]+", "".join(path.read_text() for path in sources)))
    assert len(given) == len(NOTEBOOKS) and given[0].keys() <= read and len(given[0]) == len(options)
    assert (given[0]["MRL_PICTURES"], given[0]["MRL_CREDIT"]) == (str(Path("p").resolve()), "me")
