"""Figures 10, 11 and 12 of the paper: accuracy over superclasses, within each of them, and of single classes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mrl.figures.style import (
    METHOD_STYLES,
    PAPER,
    add_legend,
    counts,
    dataset_of,
    dim_axis,
    draw_line,
    draw_paper,
    line_labels,
    line_styles,
    seeds_note,
    title,
    values_by_dim,
)
from mrl.paper import paper_rows
from mrl.results import Row, method_order

PANELS = {
    "superclass_top_1": "images of classes that have a superclass",
    "superclass_top_1_with_reject": "all images; one more class for the rest",
}
WITHIN, OF_CLASS = "top_1 within ", "top_1 of class "
COLUMNS = 5
SMALL = {"markersize": 4, "linewidth": 1.2}


def superclass_accuracy_by_dim(rows: Sequence[Row]) -> Figure:
    """Accuracy over superclasses against embedding size (figure 10 of the paper), a line per method.

    A second panel counts all images, those of classes outside the table as one more superclass, where
    there are such classes. On ImageNet the paper's 31-way values are drawn dashed in it; they are of both
    flips, as their scale tells, where ours are of one view, and the title says so.

    Args:
        rows: Of one dataset, from `mrl.studies.hierarchy`.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if row.study == "hierarchy" and row.metric in PANELS]
    dataset = dataset_of(rows, "superclass accuracy")
    of_panels = {metric: [row for row in rows if row.metric == metric] for metric in PANELS}
    of_panels = {metric: of_panel for metric, of_panel in of_panels.items() if of_panel}
    labels = line_labels(next(iter(of_panels.values())))
    styles = line_styles(labels)
    figure = Figure(figsize=(4.6 * len(of_panels) + 0.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    published = [row for row in paper_rows(dataset, "table_25") if row.metric in of_panels]
    all_axes = figure.subplots(1, len(of_panels), squeeze=False)[0]
    for axes, (metric, of_panel) in zip(all_axes, of_panels.items(), strict=True):
        _draw_lines(axes, of_panel, labels, styles)
        points = [(row.dim, 100 * row.value) for row in published if row.metric == metric and row.dim is not None]
        draw_paper(axes, points, "MRL", METHOD_STYLES["MRL"])
        dim_axis(axes, sorted({row.dim for row in of_panel if row.dim is not None}))
        axes.set_title(PANELS[metric], fontsize=10)
        axes.set_ylabel("superclass top-1 accuracy (%)")
    note = seeds_note(next(iter(of_panels.values())), labels)
    if any(row.flip for row in published) and not any(row.flip for row in rows):
        note += "; ours of one view, the paper's of both flips (inferred)"
    title(figure, f"{dataset}: {counts(rows)} validation images{note}")
    add_legend(figure, [*styles, PAPER.format("MRL")])
    return figure


def accuracy_within_superclasses(rows: Sequence[Row]) -> Figure:
    """Accuracy of telling apart the classes of each superclass, by embedding size (figure 11), a panel per superclass.

    The superclasses that gain most from the smallest to the largest size come first.

    Args:
        rows: Of one dataset, from `mrl.studies.hierarchy`.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if row.study == "hierarchy" and row.metric.startswith(WITHIN)]
    dataset = dataset_of(rows, "accuracy within superclasses")
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.metric, []).append(row)
    labels = line_labels(next(iter(by_name.values())))
    styles = {label: style | SMALL for label, style in line_styles(labels).items()}
    first = min((row.method for row in rows), key=method_order)
    names = sorted(by_name, key=lambda name: (-_gain([row for row in by_name[name] if row.method == first]), name))
    columns = min(COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.3 * columns + 0.6, 1.9 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        _draw_lines(axes, by_name[name], labels, styles)
        axes.set_title(f"{name.removeprefix(WITHIN).replace('_', ' ')} (n = {counts(by_name[name])})", fontsize=8)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    dims = sorted({row.dim for row in rows if row.dim is not None})
    for i, axes in enumerate(grid.flat[: len(names)]):
        dim_axis(axes, _few(dims))
        axes.set_xlabel("size (dims)" if i + columns >= len(names) else "", fontsize=8)
        axes.set_ylabel("top-1 (%)" if i % columns == 0 else "", fontsize=8)
        axes.tick_params(labelsize=7, labelbottom=i + columns >= len(names))
    note = seeds_note(by_name[names[0]], labels)
    title(figure, f"{dataset}: classes told apart within each superclass, by what {first} gains with size{note}")
    add_legend(figure, list(styles))
    return figure


def class_accuracy_against_full_width(rows: Sequence[Row]) -> Figure:
    """Accuracy of each class at each size minus at the largest, in points (figure 12 of the paper), a panel per method.

    A dot per class; the line is their median, the band their middle half. The cross is the class that the
    largest size costs most: where the smallest size is furthest above it.

    Args:
        rows: Of one dataset, from `mrl.studies.hierarchy.per_class`; values of several runs are averaged.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if row.study == "per_class" and row.metric.startswith(OF_CLASS)]
    dataset = dataset_of(rows, "single classes")
    labels = line_labels(rows)
    styles = line_styles(labels)
    figure = Figure(figsize=(4.6 * len(styles) + 0.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(styles), sharey=True, squeeze=False)[0]
    for i, (axes, label) in enumerate(zip(all_axes, styles, strict=True)):
        classes, dims, accuracy = _class_accuracy([row for row in rows if labels[row.method, row.run] == label])
        _draw_classes(axes, classes, dims, 100 * (accuracy - accuracy[:, -1:]), styles[label]["color"])
        axes.set_title(label, fontsize=10)
        axes.set_ylabel("" if i else "class accuracy minus that at the largest size (points)", fontsize=9)
    limits = all_axes[0].get_ylim()
    for axes in all_axes:
        dim_axis(axes, sorted({row.dim for row in rows if row.dim is not None}))
    all_axes[0].set_ylim(limits)  # differences go below 0
    num_classes = len({row.metric for row in rows})
    of = f"{num_classes:,} classes of {counts(rows)} validation images each"
    num_seeds = max(len({row.seed for row in rows if labels[row.method, row.run] == label}) for label in styles)
    means = f"; means of up to {num_seeds} seeds" if num_seeds > 1 else ""
    title(figure, f"{dataset}: {of}{means}; line: median, band: middle half")
    return figure


def _draw_lines(axes: Axes, rows: Sequence[Row], labels: dict[tuple[str, str], str], styles: dict) -> None:
    lines = values_by_dim(rows, labels)
    for label in [label for label in styles if label in lines]:
        draw_line(axes, lines[label], label, styles[label])


def _draw_classes(axes: Axes, classes: Sequence[str], dims: Sequence[int], points: np.ndarray, color: str) -> None:
    """Differences ``(C, G)`` as dots, their quartiles, and the class that loses most marked."""
    spots = np.asarray(dims) * 2 ** np.random.default_rng(0).uniform(-0.22, 0.22, points.shape)
    size = min(14.0, max(2.0, 1500 / len(classes)))
    axes.scatter(spots[:, :-1], points[:, :-1], size, color=color, alpha=0.35, linewidths=0)
    low, middle, high = np.quantile(points, (0.25, 0.5, 0.75), axis=0)
    axes.fill_between(dims, low, high, color="0.75", alpha=0.6, linewidth=0, zorder=1)
    axes.plot(dims, middle, color="black", linewidth=1.4)
    loser = int(points[:, 0].argmax())
    if points[loser, 0] > 0:
        axes.plot(dims, points[loser], color="black", linewidth=0.8, linestyle=":", marker="x", markersize=6)
        place: dict[str, Any] = {"xytext": (4, 6), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(classes[loser], (dims[0], points[loser, 0]), **place)
    axes.axhline(0, color="0.4", linewidth=0.8, zorder=1)


def _class_accuracy(rows: Sequence[Row]) -> tuple[list[str], list[int], np.ndarray]:
    """Names of C classes, G sizes, and accuracy ``(C, G)``, means over runs."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row.dim is not None:
            found.setdefault((row.metric.removeprefix(OF_CLASS), row.dim), []).append(row.value)
    classes, dims = sorted({name for name, _ in found}), sorted({dim for _, dim in found})
    accuracy = [[statistics.mean(found[name, dim]) for dim in dims] for name in classes]
    return classes, dims, np.array(accuracy)


def _gain(rows: Sequence[Row]) -> float:
    """Mean accuracy at the largest size minus at the smallest."""
    dims = [row.dim for row in rows if row.dim is not None]
    largest, smallest = ([row.value for row in rows if row.dim == dim] for dim in (max(dims), min(dims)))
    return statistics.mean(largest) - statistics.mean(smallest)


def _few(dims: Sequence[int]) -> list[int]:
    """Every second or third size, down from the largest, for axes with room for four numbers."""
    return list(dims[::-1][:: math.ceil(len(dims) / 4)][::-1])
