"""Tables and figures from committed rows, and the sections of the documents that show them.

    python -m experiments.report                    # results/tiny_imagenet, README.md, docs/RESULTS.md
    python -m experiments.report --check            # say what would change; exit status 1 if anything

A folder of results holds a folder for each group of runs with results.jsonl and provenance.json; tables.md and the
figures there are made from these two alone. In a document everything between
<!-- results: summary GROUP of grid NAME --> and <!-- end of results --> is made too ("tables": all tables).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import tables
from experiments.grids import PlannedRun
from experiments.run_state import read_rows_of, read_state
from mrl.errors import UserError
from mrl.figures import figures_of
from mrl.results import read_rows, write_rows
from mrl.rundir import atomic_write_text
from mrl.studies.hierarchy import OF_CLASS

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "results" / "tiny_imagenet"
DOCUMENTS = (REPOSITORY / "README.md", REPOSITORY / "docs" / "RESULTS.md")
ROWS, PROVENANCE, TABLES = "results.jsonl", "provenance.json", "tables.md"
SECTION = re.compile(
    r"(?P<begin><!-- results: (?P<kind>summary|tables) (?P<group>\w+) of grid (?P<grid>\S+) -->\n)"
    r".*?(?P<end><!-- end of results -->)",
    re.DOTALL,
)
# What provenance.json keeps of a run's settings: not where its files lay on the machine.
PLACES = ("--config", "--run.name", "--run.seed", "--run.dir", "--run.resume", "--data.root", "--model.init")


def publish(evaluated: Path, runs: Sequence[PlannedRun], title: str, out: Path) -> None:
    """Copy what eval.py found into ``out``, with the provenance of the runs; accuracies of single classes stay behind.

    Raises:
        UserError: As `read_rows` and `read_state`.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read_rows(evaluated / ROWS) if not row.metric.startswith(OF_CLASS)]
    write_rows(rows, out / ROWS)
    of_eval = json.loads((evaluated / PROVENANCE).read_text(encoding="utf-8"))
    record = {
        "title": title,
        "evaluation": {key: value for key, value in of_eval.items() if key not in ("command", "runs")},
        "runs": {run.name: provenance_of(run) for run in runs},
    }
    atomic_write_text(out / PROVENANCE, json.dumps(record, indent=2) + "\n")


def provenance_of(run: PlannedRun) -> dict[str, Any]:
    """Recipe, settings, seed, hardware, versions, speed and time of a finished run, without paths of its machine."""
    starts = json.loads((run.directory / PROVENANCE).read_text(encoding="utf-8"))
    state, rows = read_state(run), read_rows_of(run)
    pairs = list(zip(run.words[::2], run.words[1::2], strict=True))
    waits = [row["data_wait"] for row in rows if "data_wait" in row]
    last = {key: value for key, value in starts[-1].items() if key not in ("command", "start_step")}
    return {
        "recipe": Path(run.words[1]).stem,
        "settings": " ".join(f"{key} {value}" for key, value in pairs if key not in PLACES)
        + (f" --model.init {run.needs}" if run.needs else ""),
        "seed": run.config.run.seed,
        "hardware": ", ".join(last["gpus"]) or f"CPU {last['cpu']}",
        "images_per_second": state.images_per_second,
        "data_wait": statistics.median(waits) if waits else None,
        "seconds": state.seconds,
        "starts": len(starts),
        "top_1": state.top_1,
        **last,
    }


def write_report(results: Path, documents: Sequence[Path], check: bool = False) -> list[Path]:
    """Files whose text changes; they are written, and the figures drawn, unless ``check``.

    Raises:
        UserError: A group has no provenance.json, its rows cannot be read, or a document has a marker without its end.
    """
    texts = {folder / TABLES: tables_of(folder) for folder in groups(results)}
    texts |= {path: with_sections(path, results) for path in documents if path.is_file()}
    changed = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if not check:
        for folder in groups(results):
            draw(folder)
        for path in changed:
            atomic_write_text(path, texts[path])
    return changed


def groups(results: Path) -> list[Path]:
    """Folders of ``results`` that hold rows, by name."""
    return sorted(path.parent for path in results.glob(f"*/{ROWS}"))


def read_group(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """The rows and the provenance of one group.

    Raises:
        UserError: One of them is missing, or there is no row of linear classification.
    """
    rows, path = read_rows(folder / ROWS), folder / PROVENANCE
    if not path.is_file():
        raise UserError(f"{folder} has {ROWS} but no {PROVENANCE}, so nobody knows what its numbers are of")
    if not any(row.study == "classification" for row in rows):
        raise UserError(f"{folder / ROWS} has no row of the classification study, so it tells of no dataset")
    return rows, json.loads(path.read_text(encoding="utf-8"))


def tables_of(folder: Path) -> str:
    """The text of tables.md."""
    return f"## {folder.name}\n\n{tables.full(*read_group(folder))}\n"


def draw(folder: Path) -> None:
    """Write every figure that the rows allow into ``folder``, as PNG."""
    rows, _ = read_group(folder)
    for dataset in dict.fromkeys(row.dataset for row in rows):
        for name, figure in figures_of([row for row in rows if row.dataset == dataset]).items():
            figure.savefig(folder / f"{name}_{dataset}.png", dpi=110)


def with_sections(document: Path, results: Path) -> str:
    """The text of ``document`` with its marked sections made anew.

    Raises:
        UserError: A marker has no end.
    """
    text = document.read_text(encoding="utf-8")
    if text.count("<!-- results: ") != len(SECTION.findall(text)):
        raise UserError(f"{document}: every <!-- results: ... of grid ... --> needs its <!-- end of results -->")

    def made(match: re.Match[str]) -> str:
        folder = results / match["group"]
        return match["begin"] + section(document, folder, match["kind"], match["grid"]) + "\n" + match["end"]

    return SECTION.sub(made, text)


def section(document: Path, folder: Path, kind: str, grid: str) -> str:
    """What stands between two markers: a figure and tables, or that the grid has not been run."""
    if not (folder / ROWS).is_file():
        return f"Not run yet, so no numbers: `python -m experiments.reproduce --grid {grid}`"
    rows, provenance = read_group(folder)
    if kind == "tables":
        return tables.full(rows, provenance)
    dataset = tables.dataset_of_training(rows)
    where = Path(os.path.relpath(folder, document.parent)).as_posix()
    figure = f"![Accuracy by embedding size: {provenance['title']}]({where}/accuracy_by_dim_{dataset}.png)"
    return f"{figure}\n\n{tables.summary(rows, provenance)}\n\nMore: [{where}/{TABLES}]({where}/{TABLES})"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report from a command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of groups; default: results/tiny_imagenet"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if anything would change")
    args = parser.parse_args(argv)
    try:
        if args.results.resolve() != RESULTS and not groups(args.results):
            raise UserError(f"--results {args.results} holds no folder with {ROWS}")
        # Other results than the committed ones do not belong into the documents.
        changed = write_report(args.results, DOCUMENTS if args.results.resolve() == RESULTS else (), args.check)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in changed:
        print(f"{'would change' if args.check else 'written'}: {path}")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
