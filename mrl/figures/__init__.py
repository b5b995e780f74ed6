"""Figures from rows: one function per figure of the paper."""

import contextlib
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from mrl.figures.accuracy import accuracy_by_dim, few_shot_by_dim, robustness_by_dim
from mrl.figures.cascade import cascade_by_expected_dim, first_correct_histogram
from mrl.figures.hierarchy import (
    accuracy_within_superclasses,
    class_accuracy_against_full_width,
    superclass_accuracy_by_dim,
)
from mrl.figures.retrieval import adaptive_retrieval, baselines_by_dim, interpolation, retrieval_by_dim
from mrl.figures.style import NothingToDraw, save
from mrl.results import METHODS, Row

Draw = Callable[[Sequence[Row]], Figure]
FIGURES: dict[str, Draw] = {
    "accuracy_by_dim": accuracy_by_dim,
    "map_by_dim": retrieval_by_dim,
    "interpolation": interpolation,
    "baselines": baselines_by_dim,
    "cascade": cascade_by_expected_dim,
    "first_correct": first_correct_histogram,
    "superclasses": superclass_accuracy_by_dim,
    "within_superclasses": accuracy_within_superclasses,
    "robustness": robustness_by_dim,
    "few_shot": few_shot_by_dim,
    "classes": class_accuracy_against_full_width,
}


def figures_of(rows: Sequence[Row]) -> dict[str, Figure]:
    """``{name: figure}`` of everything that can be drawn from rows of one dataset."""
    draw_from = {name: (draw, rows) for name, draw in FIGURES.items()}
    if not any(row.study in ("classification", "retrieval") and row.method not in METHODS for row in rows):
        del draw_from["baselines"]  # without any it would repeat other figures
    for name, of_models in _adaptive(rows).items():
        draw_from[f"adaptive_retrieval_{name}"] = (adaptive_retrieval, of_models)
    figures = {}
    for name, (draw, some) in draw_from.items():
        with contextlib.suppress(NothingToDraw):
            figures[name] = draw(some)
    return figures


def _adaptive(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of adaptive retrieval by method, and by run where a method's models differ in more than their seed."""
    rows = [row for row in rows if row.study in ("adaptive_retrieval", "funnel_retrieval")]
    models: dict[str, dict[str, tuple[int, set[int | None]]]] = {}
    for row in rows:
        models.setdefault(row.method, {}).setdefault(row.run, (row.seed, set()))[1].add(row.rerank_dim)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        seeds, sizes = zip(*models[row.method].values(), strict=True)
        alike = len(set(seeds)) == len(seeds) and all(of_run == sizes[0] for of_run in sizes)
        groups.setdefault(row.method if alike else row.run, []).append(row)
    return {name.lower().replace("-", "_").replace("/", "_"): group for name, group in groups.items()}


__all__ = [
    "FIGURES",
    "accuracy_by_dim",
    "accuracy_within_superclasses",
    "adaptive_retrieval",
    "baselines_by_dim",
    "cascade_by_expected_dim",
    "class_accuracy_against_full_width",
    "few_shot_by_dim",
    "figures_of",
    "first_correct_histogram",
    "interpolation",
    "retrieval_by_dim",
    "robustness_by_dim",
    "save",
    "superclass_accuracy_by_dim",
]
