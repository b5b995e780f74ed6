"""Tables and figures from committed rows, and the parts of the documents that show them.

    python -m experiments.report                    # results/tiny_imagenet, README.md, docs/RESULTS.md
    python -m experiments.report --check            # list what would change; exit status 1 if anything would

A results folder holds one folder per group of runs, with results.jsonl and provenance.json. tables.md and the figures
are made from these two files alone, and so is the text of a document between
<!-- results: summary GROUP of grid NAME --> (or "tables" for all tables) and <!-- end of results -->.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mrl import distributed
from mrl.errors import UserError
from mrl.figures import figures_of
from mrl.figures.accuracy import is_trained, trained_dims
from mrl.figures.quantization import bytes_table
from mrl.figures.style import is_model, line_labels
from mrl.results import Row, markdown, read_rows, span
from mrl.rundir import atomic_write_text
from mrl.studies.claims import CONFIDENCE, MIN_SEEDS, Comparison, Effect, effects, paper_effects

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "results" / "tiny_imagenet"
DOCUMENTS = (REPOSITORY / "README.md", REPOSITORY / "docs" / "RESULTS.md")
ROWS, PROVENANCE, TABLES = "results.jsonl", "provenance.json", "tables.md"
SECTION = re.compile(
    r"(?P<begin><!-- results: (?P<kind>summary|tables) (?P<group>\w+) of grid (?P<grid>\S+) -->\n)"
    r".*?(?P<end><!-- end of results -->)",
    re.DOTALL,
)
TITLES = {
    ("classification", "top_1"): "Linear classification, top-1 (%)",
    ("retrieval", "top_1"): "1-NN, top-1 (%)",
    ("retrieval", "map@10"): "Retrieval, mAP@10 (%)",
    ("hierarchy", "superclass_top_1"): "Superclasses, top-1 (%)",
}
RULE = (
    f"A comparison *holds* if Student's {CONFIDENCE:.0%} interval of the mean over seeds (models of the same seed are "
    "compared) lies at or above the claimed value, *does not hold* if it lies below, and is *undecided* otherwise. "
    f"Fewer than {MIN_SEEDS} seeds support no claim. ± is one standard deviation over seeds."
)
UNITS = (
    "Differences are in percentage points; values with x are ratios (0.0x: the accuracy was never reached). The values "
    "of the paper are differences of its tables (ImageNet-1K, ResNet-50, one run each)."
)


def write_report(results: Path, documents: Sequence[Path], check: bool = False) -> list[Path]:
    """Draw the figures, write the tables and documents whose text changes, and return the paths of these.

    With ``check`` nothing is drawn or written.
    """
    groups = sorted(path.parent for path in results.glob(f"*/{ROWS}"))
    texts = {folder / TABLES: f"## {folder.name}\n\n{all_tables(*read_group(folder))}\n" for folder in groups}
    texts |= {path: with_sections(path, results) for path in documents if path.is_file()}
    changed = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if not check:
        for folder in groups:
            rows, _ = read_group(folder)
            for dataset in dict.fromkeys(row.dataset for row in rows):
                for name, figure in figures_of([row for row in rows if row.dataset == dataset]).items():
                    figure.savefig(folder / f"{name}_{dataset}.png", dpi=110)
        for path in changed:
            atomic_write_text(path, texts[path])
    return changed


def read_group(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of one group and its provenance."""
    rows, provenance = read_rows(folder / ROWS), json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    if "title" not in provenance:
        raise UserError(f"{folder} holds an evaluation, not results that experiments.reproduce published")
    return rows, provenance


def with_sections(document: Path, results: Path) -> str:
    """Return the text of ``document`` with its marked parts written again."""
    text = document.read_text(encoding="utf-8")
    if text.count("<!-- results: ") != len(SECTION.findall(text)):
        raise UserError(f"{document}: every <!-- results: ... of grid ... --> needs its <!-- end of results -->")

    def section(match: re.Match[str]) -> str:
        folder = results / match["group"]
        if not (folder / ROWS).is_file():
            made = f"Not run yet: `python -m experiments.reproduce --grid {match['grid']}`"
        elif match["kind"] == "tables":
            made = all_tables(*read_group(folder))
        else:
            made = summary(*read_group(folder), Path(os.path.relpath(folder, document.parent)).as_posix())
        return f"{match['begin']}{made}\n{match['end']}"

    return SECTION.sub(section, text)


def summary(rows: Sequence[Row], provenance: dict[str, Any], folder: str) -> str:
    """Return the part for a README: top-1 by size, and one line on the runs and the effects."""
    dataset = trained_dataset(rows)
    names: dict[str, list[str]] = {}
    for effect in measured_effects(rows, dataset):
        readings = sorted({comparison.reading for comparison in effect.comparisons if comparison.reading})
        reading = "differs by size" if len(readings) > 2 else " or ".join(readings)
        names.setdefault(reading or "not measured", []).append(effect.name)
    verdicts = "; ".join(f"{', '.join(listed)}: {reading}" for reading, listed in names.items())
    line = what_ran(rows, provenance) + (f" The paper's claims about plain MRL: {verdicts}." if verdicts else "")
    table = table_by_size(rows, dataset, "classification", "top_1").replace("model", "linear top-1 (%), by dims", 1)
    return f"{table}\n\n{line} [All tables]({folder}/{TABLES})"


def all_tables(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """Return what ran, the tables by size, the effects with every comparison, and the runs."""
    dataset = trained_dataset(rows)
    parts = [what_ran(rows, provenance)]
    for (study, metric), title in TITLES.items():
        if table := table_by_size(rows, dataset, study, metric):
            parts += [f"### {title}", table]
    if needed := bytes_table([row for row in rows if row.dataset == dataset]):
        parts += ["### Bytes per vector for a share of the full 1-NN accuracy", markdown(needed)]
    if found := measured_effects(rows, dataset):
        claims = markdown([["", "claim", "here"], *([one.name, one.claim, one.verdict] for one in found)])
        parts += ["### Effects", RULE, claims, table_of_comparisons(found), UNITS]
    return "\n\n".join([*parts, "### Runs", table_of_runs(provenance)])


def trained_dataset(rows: Sequence[Row]) -> str:
    """Return the dataset that the models classify."""
    return next(row.dataset for row in rows if row.study == "classification")


def what_ran(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """Return one sentence: how many runs, seeds and images, on what hardware, in what time."""
    runs, dataset = provenance["runs"].values(), trained_dataset(rows)
    num_images = max(row.n for row in rows if (row.dataset, row.study) == (dataset, "classification"))
    seeds = sorted({row.seed for row in rows})
    hardware = ", ".join(sorted({run["hardware"] for run in runs}))
    seconds = sum(run["seconds"] for run in runs)
    return (
        f"{provenance['title']}: {len(runs)} runs, {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, seeds))}, on {hardware}, {duration(seconds)} of training; {num_images:,} validation "
        f"images of {dataset}."
    )


def table_by_size(rows: Sequence[Row], dataset: str, study: str, metric: str) -> str:
    """Return means in percent ± one standard deviation over seeds, a line per method, or "" if there are no rows.

    Sizes at which a nested model was not trained are left out.
    """
    trained, key = trained_dims(rows), (dataset, study, metric, None)
    shown = [row for row in rows if (row.dataset, row.study, row.metric, row.group) == key and is_model(row.method)]
    shown = [row for row in shown if is_trained(row, trained)]
    if not shown:
        return ""
    labels = line_labels(shown)
    frame = pd.DataFrame(
        {"model": labels[row.method, row.run], "dim": row.dim, "percent": 100 * row.value} for row in shown
    )
    by_size = frame.groupby(["model", "dim"])["percent"].agg(["mean", "std", "size"])
    spread = by_size["std"].map(" ± {:.2f}".format).where(by_size["size"] > 1, "")
    cells = (by_size["mean"].map("{:.2f}".format) + spread).unstack("dim", fill_value="")
    seeds = by_size["size"].groupby("model").agg(span)
    lines = [[model, *cells.loc[model], seeds[model]] for model in dict.fromkeys(labels.values())]
    return markdown([["model", *map(str, cells.columns), "seeds"], *lines])


def measured_effects(rows: Sequence[Row], dataset: str) -> list[Effect]:
    """Return the effects; none if the rows are of one method only, or of several models of one kind and seed."""
    labels = line_labels([row for row in rows if row.dataset == dataset and row.study == "classification"])
    methods = {method for method, _ in labels if is_model(method)}
    one_line = len(set(labels.values())) == len({method for method, _ in labels})
    return effects(rows, dataset) if len(methods) > 1 and one_line else []


def table_of_comparisons(found: Sequence[Effect]) -> str:
    """Return every comparison with its mean, interval, number of seeds, claim, the paper's value and its reading."""
    paper = paper_effects()
    table = [["", "comparison", "mean", f"{CONFIDENCE:.0%} interval", "seeds", "claimed", "paper", "reading"]]
    for effect in found:
        for one in effect.comparisons:
            std = "" if one.std is None else f" ± {amount(one, one.std).lstrip('+')}"
            interval = [] if one.interval is None else [amount(one, value) for value in one.interval]
            claimed = "" if one.threshold is None else f"at least {amount(one, one.threshold)}"
            published = paper.get((effect.name, one.what))
            cells = [effect.name, one.what, amount(one, one.mean) + std, " to ".join(interval), str(one.n), claimed]
            table.append([*cells, "" if published is None else amount(one, published), one.reading or ""])
    return markdown(table)


def amount(comparison: Comparison, value: float) -> str:
    """Return a value in the unit of its comparison: "+1.34" percentage points, "14.0x"."""
    return f"{value:.1f}x" if comparison.unit == "times" else f"{100 * value:+.2f}"


def table_of_runs(provenance: dict[str, Any]) -> str:
    """Return the settings that all runs share, and one line per recipe and further settings: seeds, speed, versions."""
    runs = list(provenance["runs"].values())
    settings = [re.split(r"\s(?=--)", run["settings"]) for run in runs]
    shared = [one for one in settings[0] if all(one in other for other in settings)] if len(runs) > 1 else []
    frame = pd.DataFrame(runs)
    frame["name"] = [
        " ".join([run["recipe"], *(one for one in of_run if one and one not in shared)])
        for run, of_run in zip(runs, settings, strict=True)
    ]
    dirty = frame["git_dirty"].eq(True).map(" + changes".__mul__)  # None without git
    frame["commit"] = frame["git_commit"].fillna("unknown").str[:7] + dirty
    table = [["recipe", "seeds", "images/s", "training of one run", "hardware", "torch", "commit"]]
    for name, some in frame.groupby("name", sort=False):
        cells = [str(name), ", ".join(map(str, some["seed"])), span(some["images_per_second"], "{:,.0f}".format)]
        rest = (", ".join(dict.fromkeys(some[key])) for key in ("hardware", "torch", "commit"))
        table.append([*cells, span(some["seconds"], duration), *rest])
    return (f"All runs: `{' '.join(shared)}`\n\n" if shared else "") + markdown(table)


def duration(seconds: float) -> str:
    """Return hours and minutes, or seconds below two minutes, or "unknown"."""
    if math.isnan(seconds):
        return "unknown"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; return the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    results = "folder of groups; default: results/tiny_imagenet"
    parser.add_argument("--results", type=Path, default=RESULTS, help=results)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if anything would change")
    args = parser.parse_args(argv)

    def report() -> int:
        if not any(args.results.glob(f"*/{ROWS}")):
            raise UserError(f"--results {args.results} holds no folder with {ROWS}")
        # The documents show the committed results only.
        changed = write_report(args.results, DOCUMENTS if args.results.resolve() == RESULTS else (), args.check)
        for path in changed:
            print(f"{'would change' if args.check else 'written'}: {path}")
        return int(args.check and bool(changed))

    return distributed.run(report, "stopped")


if __name__ == "__main__":
    sys.exit(main())
