"""Figure 6 of the paper, adaptive classification, and the histogram of table 22."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mrl.figures.style import (
    METHOD_STYLES,
    METRIC_LABELS,
    PAPER,
    Style,
    add_legend,
    counts,
    dataset_of,
    dim_axis,
    draw_paper,
    line_labels,
    line_styles,
    seeds_note,
    title,
)
from mrl.paper import paper_rows
from mrl.results import Row

Point = tuple[float, float]
CASCADE_STYLES: dict[str, Style] = {
    "MRL cascade": METHOD_STYLES["MRL"],
    "MRL cascade, joint": {"color": "#56B4E9", "marker": "^", "linestyle": "-."},
    "MRL-E cascade": METHOD_STYLES["MRL-E"],
    "MRL-E cascade, joint": {"color": "#E69F00", "marker": "P", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    "FF": {**METHOD_STYLES["FF"], "markersize": 6},
}
CASCADE_LABELS = {
    "MRL cascade": "MRL cascade, thresholds pairwise",
    "MRL cascade, joint": "MRL cascade, thresholds joint",
    "MRL-E cascade": "MRL-E cascade, thresholds pairwise",
    "MRL-E cascade, joint": "MRL-E cascade, thresholds joint",
    "FF": "FF (one model per size)",
}
HATCHES = ("", "///", "...", "xxx")


def cascade_by_expected_dim(rows: Sequence[Row]) -> Figure:
    """Accuracy of adaptive classification against expected dim (figure 6 of the paper), fixed-feature models beside it.

    A point per cap, the largest size allowed, which is written below the points of the first cascade, if there is one.
    Bars are one standard deviation along both axes: over models of several seeds where there are such, else over the
    random draws of the fitting images. On ImageNet the paper's points are dashed.

    Args:
        rows: Of one dataset, from `mrl.studies.adaptive_classification`.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if row.study == "cascade" and row.expected_dim is not None]
    dataset = dataset_of(rows, "the cascade study")
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    accuracies = [row for row in rows if row.metric == "top_1"]
    labels = line_labels(accuracies, CASCADE_LABELS, _cascade_order)
    styles = line_styles(labels, CASCADE_STYLES)
    for label, style in styles.items():
        _draw_cascade(axes, [row for row in rows if labels[row.method, row.run] == label], label, style)
    of_cascades = [row for row in accuracies if row.method != "FF"]
    if of_cascades:
        numbered = next(labels[key] for key in labels if key[0] != "FF")
        of_numbered = [row for row in accuracies if labels[row.method, row.run] == numbered]
        _number(axes, _mean_points(of_numbered, "top_1"), styles[numbered]["color"])
    published = paper_rows(dataset, "figure_6")
    for method in dict.fromkeys(row.method for row in published):
        points = _mean_points([row for row in published if row.method == method], "top_1")
        draw_paper(axes, zip(*_columns(points), strict=True), method, CASCADE_STYLES[method])
    dim_axis(axes, sorted({row.dim for row in rows if row.dim is not None}))
    axes.set_xlabel("expected dim (mean size that decides an image; dims)")
    axes.set_ylabel(METRIC_LABELS["top_1"])
    # Without a cascade nothing is fitted; the draws are then of the images that FF is scored on.
    images, drawn = (" not fitted on", "the fitting images") if of_cascades else ("", "these images")
    note = seeds_note(accuracies, labels) or f"; mean and standard deviation over random draws of {drawn}"
    title(figure, f"{dataset}: {counts(rows)} validation images{images}{note}")
    add_legend(figure, [*styles, *map(PAPER.format, CASCADE_LABELS)], entry_inches=3.2)
    return figure


def first_correct_histogram(rows: Sequence[Row]) -> Figure:
    """The share of images by the smallest prefix that is right, and of those that none is (table 22 of the paper).

    Bars per method, each with its value in percent; where it was trained with several seeds their mean, with one
    standard deviation. On ImageNet the paper's values of the same methods are dashed.

    Args:
        rows: Of one dataset, from `mrl.studies.adaptive_classification`.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if row.study == "oracle" and row.metric in ("first_correct", "never_correct")]
    dataset = dataset_of(rows, "the oracle study")
    dims = sorted({row.dim for row in rows if row.dim is not None})
    labels = line_labels(rows)
    styles = line_styles(labels)
    width = 0.8 / len(styles)
    figure = Figure(figsize=(max(5.6, 1.0 + 0.75 * (len(dims) + 1) * len(styles) ** 0.5), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    columns = [*dims, None]
    for i, (label, style) in enumerate(styles.items()):
        of_label = [row for row in rows if labels[row.method, row.run] == label]
        shares = [[100 * row.value for row in of_label if row.dim == dim] for dim in columns]
        places = [column + (i - (len(styles) - 1) / 2) * width for column in range(len(columns))]
        look: dict[str, Any] = {"facecolor": style["color"], "edgecolor": "white", "hatch": HATCHES[i % len(HATCHES)]}
        if max(map(len, shares)) > 1:
            look |= {"yerr": [_spread(of_dim) for of_dim in shares], "error_kw": {"elinewidth": 1, "capsize": 2}}
        bars = axes.bar(places, [_mean(of_dim) for of_dim in shares], width, label=label, **look)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the paper's line may run there
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2, bbox=behind, zorder=4)
    for row in paper_rows(dataset, "table_22", "table_22_never"):
        if row.dim in columns and row.method in {method for method, _ in labels}:
            middle = columns.index(row.dim)
            label = PAPER.format(row.method)
            axes.hlines(100 * row.value, middle - 0.45, middle + 0.45, "black", "dashed", label=label, linewidth=1)
    axes.set_xticks(range(len(columns)), [*map(str, dims), "none"])
    axes.set_xlabel("smallest prefix that is right (dims)")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("images (%)")
    axes.grid(True, axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    note = seeds_note([row for row in rows if row.metric == "first_correct"], labels)
    title(figure, f"{dataset}: {counts(rows)} validation images{note}")
    add_legend(figure, [*styles, *(PAPER.format(method) for method, _ in labels)])
    return figure


def _draw_cascade(axes: Axes, rows: Sequence[Row], label: str, style: Style) -> None:
    """One line's points with their spread: that of the seeds, or of the draws where there is one."""
    points, of_draws = _mean_points(rows, "top_1"), _mean_points(rows, "top_1_std")
    bars = {cap: of_draws.get(cap, (0.0, 0.0)) for cap in points}
    if len({row.run for row in rows}) > 1:
        for cap in points:
            same = [row for row in rows if (row.metric, row.dim) == ("top_1", cap)]
            bars[cap] = (_spread([row.expected_dim or 0.0 for row in same]), _spread([row.value for row in same]))
    (dims, accuracies), (across, along) = _columns(points), _columns(bars)
    look: dict[str, Any] = {"linewidth": 1.6, "markersize": 5, "markerfacecolor": "white", **style}
    axes.errorbar(dims, accuracies, yerr=along, xerr=across, capsize=2, elinewidth=0.8, label=label, **look)


def _number(axes: Axes, points: dict[int, Point], color: str) -> None:
    """Write each cap below its point, unless the one to its left is too near for both to be read."""
    last = 0.0
    for cap, (dim, value) in points.items():
        if dim > 1.15 * last:
            place: dict[str, Any] = {"xytext": (3, -11), "textcoords": "offset points", "fontsize": 7, "color": color}
            axes.annotate(f"\u2264{cap}", (dim, 100 * value), **place)
            last = dim


def _mean_points(rows: Sequence[Row], metric: str) -> dict[int, Point]:
    """``{dim: (expected dim, value)}`` in ascending order, means over runs."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row.metric == metric and row.dim is not None:
            found.setdefault(row.dim, []).append(row)
    return {
        dim: (_mean([row.expected_dim or 0.0 for row in of_dim]), _mean([row.value for row in of_dim]))
        for dim, of_dim in sorted(found.items())
    }


def _columns(points: dict[int, Point]) -> tuple[list[float], list[float]]:
    """Expected dims, and values in percent."""
    return [expected for expected, _ in points.values()], [100 * value for _, value in points.values()]


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else 0.0


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _cascade_order(method: str) -> tuple[int, str]:
    known = list(CASCADE_STYLES)
    return (known.index(method) if method in known else len(known), method)
