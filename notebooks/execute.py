"""Execute the notebooks on a run, and keep their outputs in them.

    python notebooks/execute.py                         # on two runs on handwritten digits, see make notebooks
    python notebooks/execute.py --run runs/mine --other_run runs/mine_ff --out mine

The notebooks in this folder stay as they are, unless it is the --out. Paths of this machine, times of cells and widget
states are not kept.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MAX_COLORS = 16_384  # in a figure; what has more is made of photographs
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(source: Path, target: Path, environment: dict[str, str]) -> None:
    """Execute ``source`` in the folder of the notebooks and write it with its outputs to ``target``."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(source, as_version=4)
    settings: dict[str, Any] = {"timeout": 3600, "record_timing": False, "store_widget_state": False}
    client = NotebookClient(notebook, resources={"metadata": {"path": str(HERE)}}, **settings)
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    client.execute(env=os.environ | {"PYTHONPATH": path} | environment)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
                if "image/png" in output.get("data", {}):
                    output["data"] |= shrink(output["data"].pop("image/png"))
                if "text" in output:
                    output["text"] = output["text"].replace(f"{HERE.parent}{os.sep}", "")
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def shrink(png: str) -> dict[str, str]:
    """Return ``{type: base64}`` of a PNG: one of 256 colors, which looks the same, or of photographs a JPEG."""
    from PIL import Image

    file, image = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    if image.getcolors(MAX_COLORS) is None:
        image.save(file, "JPEG", quality=70, optimize=True)
        return {"image/jpeg": base64.b64encode(file.getvalue()).decode()}
    image.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
    return {"image/png": base64.b64encode(file.getvalue()).decode()}


def main() -> None:
    """Execute from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("notebooks", nargs="*", type=Path, help="default: all in this folder")
    add("--run", type=Path, help="a run directory; default: runs/digits_mrl")
    add("--other_run", type=Path, help="the run to compare it with; default: runs/digits_ff")
    add("--title", help="name of the runs' data in figures; default: that of the data set or folder")
    add("--superclasses", type=Path, help="a table with the columns class, superclass and maybe name")
    add("--pictures", type=Path, help="show images of this folder's train and val, not the run's own")
    add("--credit", help="the source of the pictures, written above them")
    add(
        "--out",
        type=Path,
        default=Path("runs/notebooks"),
        help="folder for the executed notebooks; default: %(default)s",
    )
    args = vars(parser.parse_args())
    notebooks, out = args.pop("notebooks") or sorted(HERE.glob("*.ipynb")), args.pop("out")
    # The kernels run in the folder of the notebooks, so paths must be absolute.
    texts = {key: str(value.resolve() if isinstance(value, Path) else value) for key, value in args.items() if value}
    for notebook in notebooks:
        target = out / notebook.name
        execute(notebook, target, {f"MRL_{key.upper()}": text for key, text in texts.items()})
        print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
