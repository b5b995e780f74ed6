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
    OTHER_STYLES,
    Style,
    add_legend,
    counts,
    dataset_of,
    dim_axis,
    title,
)
from mrl.paper import paper_rows
from mrl.results import Row, method_order

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
PAPER = "{} (paper)"
HATCHES = ("", "///", "...", "xxx")


def cascade_by_expected_dim(rows: Sequence[Row]) -> Figure:
    """Accuracy of adaptive classification against expected dim (figure 6 of the paper), fixed-feature models beside it.

    A point per cap, the largest size allowed, which is written below the points of the first cascade.
    Bars are one standard deviation over the random draws of the fitting images, along both axes. Where
    a method was trained several times, points and bars are means. On ImageNet the paper's points are dashed.

    Args:
        rows: Of one dataset, from `mrl.studies.cascade`.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if row.study == "cascade" and row.expected_dim is not None]
    dataset = dataset_of(rows, "the cascade study")
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    methods = sorted({row.method for row in rows}, key=_cascade_order)
    styles = _styles(methods)
    for method in methods:
        _draw_cascade(axes, [row for row in rows if row.method == method], method, styles[method])
    numbered = next((method for method in methods if method.endswith(" cascade")), methods[0])
    _number(axes, _mean_points([row for row in rows if row.method == numbered], "top_1"), styles[numbered]["color"])
    published = paper_rows(dataset, "figure_6")
    for method in dict.fromkeys(row.method for row in published):
        points = _mean_points([row for row in published if row.method == method], "top_1")
        look = {"color": styles.get(method, METHOD_STYLES["FF"])["color"], "marker": "", "linewidth": 1, "zorder": 1}
        label = PAPER.format(CASCADE_LABELS[method])
        axes.plot(*_columns(points), linestyle=(0, (6, 3)), label=label, **look)
    dim_axis(axes, sorted({row.dim for row in rows if row.dim is not None}))
    axes.set_xlabel("expected dim (mean size that decides an image; dims)")
    axes.set_ylabel(METRIC_LABELS["top_1"])
    draws = "mean and standard deviation over random draws of the fitting images"
    title(figure, f"{dataset}: {counts(rows)} validation images not fitted on; {draws}")
    labels = [CASCADE_LABELS.get(method, method) for method in methods]
    add_legend(figure, labels + [PAPER.format(CASCADE_LABELS[m]) for m in CASCADE_LABELS], entry_inches=3.2)
    return figure


def first_correct_histogram(rows: Sequence[Row]) -> Figure:
    """The share of images by the smallest prefix that is right, and of those that none is (table 22 of the paper).

    Bars per method, means over its runs, each with its value in percent. On ImageNet the paper's values are dashed.

    Args:
        rows: Of one dataset, from `mrl.studies.oracle`.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if row.study == "oracle" and row.metric in ("first_correct", "never_correct")]
    dataset = dataset_of(rows, "the oracle study")
    dims = sorted({row.dim for row in rows if row.dim is not None})
    methods = sorted({row.method for row in rows}, key=method_order)
    width = 0.8 / len(methods)
    figure = Figure(figsize=(max(5.6, 1.0 + 0.75 * (len(dims) + 1) * len(methods) ** 0.5), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    columns = [*dims, None]
    for i, method in enumerate(methods):
        shares = [_mean([row.value for row in rows if (row.method, row.dim) == (method, dim)]) for dim in columns]
        places = [column + (i - (len(methods) - 1) / 2) * width for column in range(len(columns))]
        color = METHOD_STYLES.get(method, OTHER_STYLES[i])["color"]
        look: dict[str, Any] = {"facecolor": color, "edgecolor": "white", "hatch": HATCHES[i % len(HATCHES)]}
        bars = axes.bar(places, [100 * share for share in shares], width, label=method, **look)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    for row in paper_rows(dataset, "table_22", "table_22_never"):
        if row.dim in columns:
            middle = columns.index(row.dim)
            label = PAPER.format(row.method)
            axes.hlines(100 * row.value, middle - 0.45, middle + 0.45, "black", "dashed", label=label, linewidth=1)
    axes.set_xticks(range(len(columns)), [*map(str, dims), "none"])
    axes.set_xlabel("smallest prefix that is right (dims)")
    axes.set_ylabel("images (%)")
    axes.grid(True, axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    title(figure, f"{dataset}: {counts(rows)} validation images")
    add_legend(figure, [*methods, *map(PAPER.format, methods)])
    return figure


def _draw_cascade(axes: Axes, rows: Sequence[Row], method: str, style: Style) -> None:
    """One method's points with their spread."""
    points, spreads = _mean_points(rows, "top_1"), _mean_points(rows, "top_1_std")
    dims, accuracies = _columns(points)
    look: dict[str, Any] = {"linewidth": 1.6, "markersize": 5, "markerfacecolor": "white", **style}
    bars = _columns({cap: spreads.get(cap, (0.0, 0.0)) for cap in points})
    axes.errorbar(
        dims,
        accuracies,
        yerr=bars[1],
        xerr=bars[0],
        capsize=2,
        elinewidth=0.8,
        label=CASCADE_LABELS.get(method, method),
        **look,
    )


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


def _cascade_order(method: str) -> tuple[int, str]:
    known = list(CASCADE_STYLES)
    return (known.index(method) if method in known else len(known), method)


def _styles(methods: Sequence[str]) -> dict[str, Style]:
    others = [method for method in methods if method not in CASCADE_STYLES]
    return CASCADE_STYLES | {method: OTHER_STYLES[i % len(OTHER_STYLES)] for i, method in enumerate(others)}
