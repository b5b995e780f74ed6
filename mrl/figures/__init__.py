"""Figures from rows: one function per figure of the paper. Nothing here runs a backbone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.figure import Figure

from mrl.figures.accuracy import PANELS, by_dim, interpolation
from mrl.figures.adaptive import STUDIES, adaptive_retrieval, cascade_by_expected_dim, first_correct
from mrl.figures.hierarchy import accuracy_within_superclasses, class_accuracy_against_full_width
from mrl.figures.quantization import accuracy_by_bytes
from mrl.figures.style import NothingToDraw, line_labels, save
from mrl.results import Row

FIGURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    **{name: partial(by_dim, name=name) for name in PANELS},
    "interpolation": interpolation,
    "cascade": cascade_by_expected_dim,
    "first_correct": first_correct,
    "within_superclasses": accuracy_within_superclasses,
    "classes": class_accuracy_against_full_width,
    "accuracy_by_bytes": accuracy_by_bytes,
}
__all__ = ["FIGURES", "figures_of", "save"]


def figures_of(rows: Sequence[Row]) -> dict[str, Figure]:
    """Return ``{name: figure}`` of everything that can be drawn from rows of one dataset.

    Adaptive retrieval has a figure per method, or per run if the runs of a method differ in more than their seed.
    """
    figures = {}
    for name, draw in FIGURES.items():
        with contextlib.suppress(NothingToDraw):
            figures[name] = draw(rows)
    searches = [row for row in rows if row.study in STUDIES]
    labels = line_labels(searches)
    for label in dict.fromkeys(labels.values()):
        name = re.sub(r"\W+", "_", label.rpartition(": ")[2].lower())
        while f"adaptive_retrieval_{name}" in figures:  # runs lr-1 and lr_1
            name += "_"
        of_label = [row for row in searches if labels[row.method, row.run] == label]
        figures[f"adaptive_retrieval_{name}"] = adaptive_retrieval(of_label)
    return figures
