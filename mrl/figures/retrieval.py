"""Figures 5, 7 and 8 of the paper: retrieval by embedding size, at sizes between the trained ones, and by cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from mrl.errors import UserError
from mrl.figures.accuracy import NESTED, check_one_dataset, is_trained, panels_by_dim, trained_dims
from mrl.figures.style import (
    PAPER,
    NothingToDraw,
    add_legend,
    counts,
    dim_axis,
    draw_line,
    draw_paper,
    line_labels,
    line_styles,
    metric_label,
    title,
    values_by_dim,
)
from mrl.paper import paper_rows
from mrl.results import METHODS, Row

BASELINE_PANELS = {
    ("classification", "top_1"): "linear classification",
    ("retrieval", "top_1"): "1-nearest neighbor",
    ("retrieval", "map@10"): "retrieval",
}
PAIRS, FUNNELS = "adaptive_retrieval", "funnel_retrieval"
COST_LABELS = {"cost": "million multiply-adds per query", "ms_per_query": "measured milliseconds per query (CPU)"}
Point = tuple[str, int | None, int | None, int | None]  # study, shortlist_dim, shortlist_size, rerank_dim


def retrieval_by_dim(rows: Sequence[Row], metric: str = "map@10") -> Figure:
    """Retrieval quality against embedding size (figure 7 of the paper), one line per method, trained sizes only.

    Args:
        rows: Of one dataset; those of classification tell which sizes of a nested model were trained.
        metric: "map@10", "precision@25" and so on.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    trained = trained_dims(rows)
    shown = [row for row in rows if row.method in METHODS and is_trained(row, trained)]
    return panels_by_dim(shown, {("retrieval", metric): "retrieval"})


def baselines_by_dim(rows: Sequence[Row]) -> Figure:
    """Nested training beside other ways to a small embedding (tables 1 and 2, figures 2, 3 and 7 of the paper).

    A panel each for linear classification, 1-NN and map@10; a line for every method in ``rows``.

    Args:
        rows: Of one dataset; those of classification tell which sizes of a nested model were trained.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    trained = trained_dims(rows)
    return panels_by_dim([row for row in rows if is_trained(row, trained)], BASELINE_PANELS)


def interpolation(rows: Sequence[Row], metric: str = "top_1") -> Figure:
    """Retrieval at sizes that were never trained (figure 5 of the paper): hollow markers, trained sizes filled.

    Lines join the trained sizes. Fixed-feature models, each trained at its size, stand beside them.

    Args:
        rows: Of one dataset; those of classification tell which sizes were trained.
        metric: "top_1" (1-NN accuracy), "map@10" and so on.

    Raises:
        UserError: There is nothing to draw, such as no size that was never trained, the rows are of several
            datasets, or a nested model has no rows of classification.
    """
    trained = trained_dims(rows)
    rows = [row for row in rows if (row.study, row.metric) == ("retrieval", metric) and row.method in (*NESTED, "FF")]
    for row in rows:
        if row.method in NESTED and (row.method, row.run) not in trained:
            raise NothingToDraw(f"run {row.run} has no classification rows, which tell the sizes it was trained at")
    at_trained = [row for row in rows if is_trained(row, trained)]
    between = [row for row in rows if not is_trained(row, trained)]
    if rows and not between:
        raise NothingToDraw(f"there are no rows of retrieval with the metric {metric} at sizes that were never trained")
    figure = panels_by_dim(at_trained, {("retrieval", metric): "at trained sizes and between them"}, filled=True)
    [axes] = figure.axes
    labels = line_labels(at_trained)
    styles = line_styles(labels)
    for label, line in values_by_dim(between, labels).items():
        draw_line(axes, line, "_between", styles[label] | {"linestyle": "none", "markersize": 6})
    dim_axis(axes, sorted({row.dim for row in at_trained if row.dim is not None}))
    kinds = {"trained size": "0.3", "size between, never trained": "white"}
    for kind, fill in kinds.items():
        axes.plot([], [], "o", color="0.3", markerfacecolor=fill, label=kind)
    for legend in list(figure.legends):
        legend.remove()
    add_legend(figure, [*styles, *kinds, *(PAPER.format(method) for method, _ in labels)])
    return figure


def adaptive_retrieval(rows: Sequence[Row]) -> Figure:
    """Quality against cost of adaptive and funnel retrieval (figure 8 of the paper), for the models of one method.

    Rows of panels: map@10 and top-1. Columns: multiply-adds and, where they were measured,
    milliseconds; the two are different things. Means over models of several seeds, bars one standard
    deviation.

    Args:
        rows: Of one dataset and one method; other studies are passed over.

    Raises:
        UserError: There is nothing to draw, the rows are of several datasets or methods, or of
            several models with one seed.
    """
    metrics = ("map@10", "top_1")
    rows = [row for row in rows if row.study in (PAIRS, FUNNELS) and row.metric in metrics]
    check_one_dataset(rows, metrics)
    methods, models = sorted({row.method for row in rows}), {(row.run, row.seed) for row in rows}
    if len(methods) > 1 or len({seed for _, seed in models}) < len(models):
        raise UserError(
            f"one figure shows models of one method and of different seeds, but was given {methods} of the runs "
            f"{sorted(run for run, _ in models)}"
        )
    shown = [metric for metric in metrics if any(row.metric == metric for row in rows)]
    by_time = all(row.ms_per_query is not None for row in rows)
    columns = list(COST_LABELS)[: 1 + by_time]
    figure = Figure(figsize=(5.0 * len(columns) + 0.4, 3.4 * len(shown) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), len(columns), squeeze=False, sharex="col", sharey="row")
    series = _series(rows)
    published = [row for row in paper_rows(rows[0].dataset, "table_11") if row.method == methods[0]]
    for all_axes, metric in zip(grid, shown, strict=True):
        for axes, column in zip(all_axes, columns, strict=True):
            _draw_series(axes, series, [row for row in rows if row.metric == metric], column)
        _draw_paper(all_axes[0], series, [row for row in published if row.metric == metric])
        all_axes[0].set_ylabel(metric_label(metric))
    for axes, column in zip(grid[-1], columns, strict=True):
        axes.set_xlabel(COST_LABELS[column])
    seeds = "" if len(models) == 1 else f"; mean and standard deviation of {len(models)} seeds"
    names = f"{methods[0]} ({rows[0].run})" if len(models) == 1 else methods[0]
    title(figure, f"{rows[0].dataset}, {names}: {counts(rows)} queries{seeds}")
    add_legend(figure, [*series, *(PAPER.format(_short(label)) for label in series)], entry_inches=3.4)
    return figure


def _short(label: str) -> str:
    return label.partition(" (")[0]


def _point(row: Row) -> Point:
    return row.study, row.shortlist_dim, row.shortlist_size, row.rerank_dim


def _series(rows: Sequence[Row]) -> dict[str, tuple[list[Point], dict[str, Any]]]:
    """``{label: (points by rising shortlist_dim, style)}``, those without points left out."""
    points = sorted({_point(row) for row in rows}, key=lambda point: tuple(map(str, point[:1])) + point[1:])
    full = max(point[3] or 0 for point in points)
    plain = [point for point in points if point[1] == point[3]]
    # Only pairs of sizes hold such points, and all pairs have one shortlist size.
    size = plain[0][2] if plain else None
    pairs = [point for point in points if point[0] == PAIRS and point[2] == size and point[1] != point[3]]
    to_full = [point for point in pairs if point[3] == full] + [point for point in plain if point[3] == full]
    series: dict[str, tuple[list[Point], dict[str, Any]]] = {
        "one search, no reranking (numbers: its dims)": (plain, {"color": "#000000", "marker": "D", "linestyle": ":"}),
        f"shortlist of {size}, reranked at {full} dims": (to_full, {"color": "#0072B2", "marker": "o"}),
        f"shortlist of {size}, reranked at fewer dims": (
            [point for point in pairs if point[3] != full],
            {"color": "0.6", "marker": ".", "linestyle": "none"},
        ),
        "other shortlist lengths": (
            [point for point in points if point[0] == PAIRS and point[2] != size],
            {"color": "#009E73", "marker": "^", "linestyle": "none"},
        ),
        "funnel": (
            [point for point in points if point[0] == FUNNELS],
            {"color": "#D55E00", "marker": "*", "linestyle": "none", "markersize": 9},
        ),
    }
    return {label: of_label for label, of_label in series.items() if of_label[0]}


def _draw_paper(axes: Axes, series: dict[str, tuple[list[Point], dict[str, Any]]], published: Sequence[Row]) -> None:
    """The paper's values of the same configurations against multiply-adds."""
    by_point = {_point(row): row for row in published}
    for label, (points, style) in series.items():
        same = [by_point[point] for point in points if point in by_point]
        if style.get("linestyle") != "none":
            draw_paper(
                axes, [(row.cost, 100 * row.value) for row in same if row.cost is not None], _short(label), style
            )


def _draw_series(
    axes: Axes, series: dict[str, tuple[list[Point], dict[str, Any]]], rows: Sequence[Row], column: str
) -> None:
    by_point: dict[Point, list[Row]] = {}
    for row in rows:
        by_point.setdefault(_point(row), []).append(row)
    for label, (points, style) in series.items():
        drawn = [by_point[point] for point in points]
        costs = [statistics.mean(getattr(row, column) for row in same) for same in drawn]
        values = [100 * statistics.mean(row.value for row in same) for same in drawn]
        look: dict[str, Any] = {"linewidth": 1.3, "markersize": 5, "markerfacecolor": "white", **style, "label": label}
        if label == "funnel":
            look |= {"markerfacecolor": style["color"], "zorder": 4}
        if costs != sorted(costs):
            look["linestyle"] = "none"  # times of small searches may not rise with the size
        if max(map(len, drawn)) == 1 or style["marker"] == ".":  # gray points are too many for bars
            axes.plot(costs, values, **look)
        else:
            spread = [100 * statistics.stdev(row.value for row in same) if len(same) > 1 else 0.0 for same in drawn]
            axes.errorbar(costs, values, yerr=spread, capsize=2, elinewidth=0.8, **look)
        if label.startswith("one search"):
            # Times of small sizes lie too close for numbers.
            numbered = slice(None) if column == "cost" else slice(None, None, max(1, len(points) - 1))
            for point, cost, value in list(zip(points, costs, values, strict=True))[numbered]:
                place: Any = {"xytext": (5, -9), "textcoords": "offset points", "ha": "left", "fontsize": 7}
                axes.annotate(str(point[1]), (cost, value), **place)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.12)
    axes.grid(True, color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
