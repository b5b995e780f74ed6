"""Rows of several runs and their provenance as Markdown: tables by size, effects, and the runs themselves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.run_state import duration
from mrl.figures.accuracy import is_trained, trained_dims
from mrl.figures.style import line_labels, line_styles, values_by_dim
from mrl.results import METHODS, Row
from mrl.studies.claims import CONFIDENCE, MIN_SEEDS, Comparison, Effect, effects, paper_effects

TABLES = {
    ("classification", "top_1"): "Linear classification, top-1 (%)",
    ("retrieval", "top_1"): "1-NN, top-1 (%)",
    ("retrieval", "map@10"): "Retrieval, mAP@10 (%)",
    ("hierarchy", "superclass_top_1"): "Superclasses, top-1 (%)",
}
RULE = (
    f"A comparison *holds* where Student's {CONFIDENCE:.0%} interval of the mean over seeds (models of one seed are "
    "compared with each other) lies at or above what is claimed, *does not hold* where it lies below, and is "
    f"*undecided* where it lies across; with fewer than {MIN_SEEDS} seeds nothing is claimed. ± is one standard "
    "deviation over seeds."
)


def dataset_of_training(rows: Sequence[Row]) -> str:
    """The dataset that the models classify: the one that has rows of linear classification."""
    return next(row.dataset for row in rows if row.study == "classification")


def summary(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """What a README has room for: what ran, top-1 by size, and a line an effect."""
    dataset = dataset_of_training(rows)
    parts = [what_ran(rows, provenance), by_size(rows, dataset, "classification", "top_1")]
    parts += [verdicts(measured(rows, dataset))]
    return "\n\n".join(part for part in parts if part)


def full(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """Everything: tables by size, effects with every comparison, the runs."""
    dataset = dataset_of_training(rows)
    parts = [what_ran(rows, provenance)]
    for (study, metric), title in TABLES.items():
        table = by_size(rows, dataset, study, metric)
        parts += [f"### {title}", table] if table else []
    found = measured(rows, dataset)
    if found:
        parts += ["### Effects", RULE, verdicts(found), comparisons(found)]
    return "\n\n".join([*parts, "### Runs", of_runs(provenance)])


def measured(rows: Sequence[Row], dataset: str) -> list[Effect]:
    """The effects, or none where the rows are of a single method or of several models of one kind and seed."""
    labels = line_labels([row for row in rows if row.dataset == dataset and row.study == "classification"])
    methods = [method for method, _ in labels if method in METHODS]
    if len(set(methods)) < 2 or len({label for (method, _), label in labels.items() if method == "MRL"}) > 1:
        return []
    return effects(rows, dataset)


def what_ran(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """One sentence: how many runs, seeds, images, on what hardware, in what time."""
    runs = provenance["runs"].values()
    dataset = dataset_of_training(rows)
    images = {row.n for row in rows if (row.dataset, row.study) == (dataset, "classification")}
    seeds = sorted({row.seed for row in rows})
    hardware = ", ".join(sorted({run["hardware"] for run in runs}))
    hours = sum(run["seconds"] for run in runs)
    return (
        f"{provenance['title']}: {len(runs)} runs, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, on "
        f"{hardware}, {duration(hours)} of training; {max(images):,} validation images of {dataset}."
    )


def by_size(rows: Sequence[Row], dataset: str, study: str, metric: str) -> str:
    """Means in percent with their standard deviation over seeds, a line a method and a column a size; "" without rows.

    Sizes that a nested model was not trained at are left out.
    """
    trained = trained_dims(rows)
    shown = [
        row
        for row in rows
        if (row.dataset, row.study, row.metric) == (dataset, study, metric)
        and row.method in METHODS
        and is_trained(row, trained)
    ]
    labels = line_labels(shown)
    lines = values_by_dim(shown, labels)
    dims = sorted({dim for line in lines.values() for dim in line})
    table = [["model", *map(str, dims), "seeds"]]
    for label in line_styles(labels):
        counts = sorted({len(values) for values in lines[label].values()})
        cells = [percent(lines[label].get(dim, [])) for dim in dims]
        table.append([label, *cells, " to ".join(map(str, sorted({counts[0], counts[-1]})))])
    return markdown(table) if shown else ""


def percent(values: Sequence[float]) -> str:
    """ "63.12 ± 0.41", without the spread where there is one value, "" where there is none."""
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def verdicts(found: Sequence[Effect]) -> str:
    """A line an effect: what is claimed and what came out."""
    if not found:
        return ""
    return markdown([["", "claim", "here"], *([one.name, one.claim, one.verdict] for one in found)])


def comparisons(found: Sequence[Effect]) -> str:
    """Every comparison with its mean, spread, interval, number of seeds, the paper's value and its reading."""
    paper = paper_effects()
    table = [["", "comparison", "mean", "95% interval", "seeds", "claimed", "paper", "reading"]]
    for effect in found:
        for one in effect.comparisons:
            interval = "" if one.interval is None else " to ".join(amount(one, value) for value in one.interval)
            spread = "" if one.std is None else f" ± {amount(one, one.std).lstrip('+')}"
            of_paper = paper.get((effect.name, one.what))
            table.append(
                [
                    effect.name,
                    one.what,
                    amount(one, one.mean) + spread,
                    interval,
                    str(one.n),
                    "" if one.threshold is None else f"at least {amount(one, one.threshold)}",
                    "" if of_paper is None else amount(one, of_paper),
                    one.reading or "",
                ]
            )
    return markdown(table) + (
        "\n\nDifferences in percentage points, with x: times (0.0x: the accuracy was never reached). The paper's "
        "values are differences of its tables (ImageNet-1K, ResNet-50, one run each)."
    )


def amount(comparison: Comparison, value: float) -> str:
    """A value in its comparison's unit: "+1.34" percentage points, "14.0x"."""
    return f"{value:.1f}x" if comparison.unit == "times" else f"{100 * value:+.2f}"


def of_runs(provenance: dict[str, Any]) -> str:
    """Every run with what it took."""
    table = [["run", "settings beside the recipe", "images/s", "data wait", "training", "hardware", "torch", "commit"]]
    for name, run in provenance["runs"].items():
        speed, wait = run["images_per_second"], run["data_wait"]
        table.append(
            [
                name,
                f"{run['recipe']} {run['settings']}".strip(),
                "" if speed is None else f"{speed:,.0f}",
                "" if wait is None else f"{wait:.0%}",
                duration(run["seconds"]),
                run["hardware"],
                run["torch"],
                (run["git_commit"] or "unknown")[:7] + (" + changes" if run["git_dirty"] else ""),
            ]
        )
    return markdown(table)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A pipe table of cells, the first line its head."""
    head, *lines = [[cell.replace("|", "\\|") for cell in line] for line in table]
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))
