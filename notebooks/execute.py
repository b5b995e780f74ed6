"""Execute the notebooks on a run, and keep their outputs in them.

    python notebooks/execute.py                                  # on the demo's runs, in place
    python notebooks/execute.py --run runs/mine --out mine/      # another run; the notebooks here stay as they are

What is kept holds no path of this machine, no times and no widget states.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def execute(source: Path, target: Path, environment: dict[str, str], timeout_s: int = 600) -> None:
    """Execute ``source`` in the folder of the notebooks and write it with its outputs to ``target``.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed; the message holds the cell and its error.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(source, as_version=4)
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        store_widget_state=False,
    )
    client.execute(env=os.environ | {"PYTHONPATH": path} | environment)
    clean(notebook)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def clean(notebook: Any) -> None:
    """Take out of a notebook what is of this machine or of this one execution."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                data = output.get("data", {})
                data.pop("application/vnd.jupyter.widget-view+json", None)
                if "image/png" in data:
                    data["image/png"] = shrink(data["image/png"])
                if "text" in output:
                    output["text"] = output["text"].replace(f"{HERE.parent}{os.sep}", "")


def shrink(png: str) -> str:
    """A PNG in base64 with 256 colors, which look the same here and take a third of the room."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> int:
    """Execute from a command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="default: all in this folder")
    parser.add_argument("--run", metavar="RUN", help="a run directory; default: runs/digits_mrl")
    parser.add_argument("--other_run", metavar="RUN", help="the run it is compared with; default: runs/digits_ff")
    parser.add_argument("--out", metavar="DIR", help="where the executed notebooks go; default: in place")
    args = parser.parse_args()
    runs = {"MRL_RUN": args.run, "MRL_OTHER_RUN": args.other_run}
    environment = {name: str(Path(run).resolve()) for name, run in runs.items() if run}
    try:
        from nbclient.exceptions import CellExecutionError
    except ImportError:
        print("error: this needs pip install -r requirements-notebooks.txt", file=sys.stderr)
        return 2
    for notebook in map(Path, args.notebooks or sorted(HERE.glob("*.ipynb"))):
        target = Path(args.out) / notebook.name if args.out else notebook
        if not notebook.is_file():
            print(f"error: {notebook} does not exist", file=sys.stderr)
            return 2
        try:
            execute(notebook, target, environment)
        except CellExecutionError as error:
            print(f"error: {notebook} stopped at a cell; {error.ename}: {error.evalue}", file=sys.stderr)
            return 1
        print(f"{target}: {target.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
