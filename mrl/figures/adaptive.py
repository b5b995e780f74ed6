"""Quality against cost: adaptive classification (figure 6, table 22) and adaptive retrieval (figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from mrl.figures import style
from mrl.results import Row

STUDIES = ("adaptive_retrieval", "funnel_retrieval")
COST_LABELS = {"cost": "million multiply-adds per query", "ms_per_query": "measured milliseconds per query (CPU)"}
SINGLE = "one search, no reranking (numbers: its dims)"
SEARCH_STYLES: dict[str, style.Style] = {
    "single": {"color": "black", "marker": "D", "linestyle": ":"},
    "full": {"color": style.BLUE, "marker": "o"},
    "fewer": {"color": "0.6", "marker": ".", "linestyle": "none", "elinewidth": 0, "capsize": 0},  # too many for bars
    "other": {"color": style.GREEN, "marker": "^", "linestyle": "none"},
    "funnel": {"color": style.RED, "marker": "*", "linestyle": "none", "markersize": 9, "markerfacecolor": style.RED},
}


@rc_context(style.RC)
def cascade_by_expected_dim(rows: Sequence[Row]) -> Figure:
    """Draw accuracy of cascades against expected dim (figure 6), a point per cap, the largest size allowed.

    Caps stand above the best cascade's points. Bars are one standard deviation along both axes: over seeds if there are
    several, else over the random splits into images to fit and to report on.
    """
    rows = [row for row in rows if row.study == "cascade" and row.metric in ("top_1", "top_1_std")]
    table = style.table_of(rows, "the cascade study")
    styles, published = style.styles_of(table), style.paper_beside(rows)
    cascades = []
    figure, [axes] = style.panels(1, 1, (6.0, 4.2))
    for label, points in table.groupby("label", sort=False):
        means = style.draw_line(axes, points, label, styles[label], "expected_dim")
        method = points.method.iloc[0]
        cascades += [means] * (method != "FF")
        of_paper = [(row.expected_dim or 0.0, row) for row in published if row.method == method]
        style.draw_paper(axes, of_paper, method, styles[label]["color"])
    last = 0.0
    best = pd.concat(cascades).sort_values("y").groupby("dim").last() if cascades else pd.DataFrame()
    for point in best.itertuples():
        if point.x > 1.15 * last:  # far enough from the last one to be read
            last = point.x
            style.annotate(axes, f"≤{point.Index}", (point.x, point.y), (-4, 6), ha="right", color="0.3")
    style.dim_axis(axes, table.dim)
    if table.dim[table.dim.between(*axes.get_xlim())].nunique() < 2:  # all cascades decide at about the same size
        style.cost_axis(axes, "")
    axes.set(xlabel="expected dim (mean size that decides an image; dims)", ylabel=style.metric_label("top_1"))
    heading = style.heading(table, f"validation images{' held out from fitting' if cascades else ''}")
    return style.finish(figure, heading, [*styles, *map(style.PAPER.format, table.method.unique())])


@rc_context(style.RC)
def first_correct(rows: Sequence[Row]) -> Figure:
    """Draw the share of images by the smallest prefix that is right, and of those with none (table 22)."""
    rows = [row for row in rows if row.study == "oracle" and row.metric in ("first_correct", "never_correct")]
    table = style.table_of(rows, "the oracle study")
    styles, sizes = style.styles_of(table), sorted(table.dim.dropna().unique())
    none = 2 * sizes[-1]  # the place of "none"
    table = table.assign(dim=table.dim.fillna(none))
    figure, [axes] = style.panels(1, 1, (6.0, 3.8))
    for (method, label), points in table.groupby(["method", "label"], sort=False):
        style.draw_line(axes, points[points.dim < none], label, styles[label])
        if (never := points[points.dim == none]).size:
            style.draw_line(axes, never, "_none", styles[label] | {"linestyle": "none"})
        published = [row for row in style.paper_beside(rows) if row.method == method]
        of_paper = [(row.dim or none, row) for row in published if row.dim is None or row.dim in sizes]
        style.draw_paper(axes, of_paper, method, styles[label]["color"])
    style.dim_axis(axes, [*sizes, none])
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))  # below 0 is room for the markers there
    ticks = [int(tick) for tick in axes.get_xticks()]
    axes.set_xticks(ticks, [*ticks[:-1], "none"])
    axes.set(xlabel="smallest prefix that is right (dims)", ylabel="images (%)")
    labels = [*styles, *map(style.PAPER.format, table.method.unique())]
    return style.finish(figure, style.heading(table, "validation images"), labels)


def search_kinds(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of adaptive retrieval by the keys of `SEARCH_STYLES`; kinds without rows are left out.

    Single searches; shortlists reranked at full width, with the single search at full width as their last point;
    shortlists reranked at fewer dims; shortlists of other lengths; funnels.
    """
    is_funnel, is_full = table.study == STUDIES[1], table.rerank_dim == table.rerank_dim.max()
    is_single = ~is_funnel & (table.shortlist_dim == table.rerank_dim)
    is_usual = ~is_funnel & (table.shortlist_size == table.shortlist_size[is_single].max())
    is_fewer, is_other = is_usual & ~is_full & ~is_single, ~is_funnel & ~is_usual
    kinds = zip(SEARCH_STYLES, (is_single, is_usual & is_full, is_fewer, is_other, is_funnel), strict=True)
    return {kind: table[of_kind] for kind, of_kind in kinds if of_kind.any()}


def has_times(table: pd.DataFrame) -> bool:
    """Return whether times were measured and, in single searches, `grow` with the size."""
    single = table[(table.study == STUDIES[0]) & (table.shortlist_dim == table.rerank_dim)]
    return bool(table.ms_per_query.notna().all()) and grow(single.groupby("shortlist_dim").ms_per_query.mean())


def grow(times: pd.Series) -> bool:
    """Return whether times by ascending size are more than overhead and noise: twice as long at last, and in order."""
    in_order = times.reset_index(drop=True).corr(pd.Series(range(len(times))), "spearman")
    return bool(times.iloc[-1] >= 2 * times.iloc[0] and in_order >= 0.9)


@rc_context(style.RC)
def adaptive_retrieval(rows: Sequence[Row]) -> Figure:
    """Draw quality against cost of adaptive and funnel retrieval (figure 8), of models that differ only in their seed.

    A row of panels for map@10 and for top-1; a column for multiply-adds and, if `has_times`, one for time. Means over
    seeds, with one standard deviation as bars.
    """
    rows = [row for row in rows if row.study in STUDIES and row.metric in ("map@10", "top_1")]
    table = style.table_of(rows, "adaptive retrieval")
    published = {(row.metric, *_sizes(row)): row for row in style.paper_beside(rows)}
    metrics = sorted(table.metric.unique())
    costs = [*COST_LABELS] if has_times(table) else ["cost"]
    number = len(metrics) * len(costs)
    figure, all_axes = style.panels(number, len(costs), (5.0, 3.5), sharex="col", sharey="row")
    grid = np.reshape(all_axes, (len(metrics), len(costs)))
    size, full = table.shortlist_size[table.shortlist_dim == table.rerank_dim].max(), table.rerank_dim.max()
    reranked = [f"shortlist of {size}, reranked at {dims} dims" for dims in (full, "fewer")]
    labels = dict(zip(SEARCH_STYLES, (SINGLE, *reranked, "other shortlist lengths", "funnel"), strict=True))
    short = {kind: label.partition(" (")[0] for kind, label in labels.items()}
    for line, metric in zip(grid, metrics, strict=True):
        line[0].set_ylabel(style.metric_label(metric))
        for kind, points in search_kinds(table[table.metric == metric]).items():
            look: style.Style = {"linewidth": 1.3, "elinewidth": 0.8, "capsize": 2} | SEARCH_STYLES[kind]
            for axes, cost in zip(line, costs, strict=True):
                means = style.draw_line(axes, points, labels[kind], look, cost)
                # Times of small sizes are too close for numbers.
                step = 1 if cost == "cost" else max(1, len(means) - 1)
                for point in means[::step].itertuples() if kind == "single" else ():
                    style.annotate(axes, point.shortlist_dim, (point.x, point.y), (5, -9))
            if kind in ("single", "full"):
                same = [published.get((metric, *_sizes(point))) for point in means.itertuples()]
                of_paper = [(row.cost or 0.0, row) for row in same if row]
                style.draw_paper(line[0], of_paper, short[kind], look["color"])
    for column, cost in zip(grid.T, costs, strict=True):
        for axes in column:
            style.cost_axis(axes, COST_LABELS[cost] if axes is column[-1] else "")
    method = style.METHOD_LABELS.get(rows[0].method, rows[0].method)
    name = method if table.run.nunique() > 1 else f"{method} ({rows[0].run})"
    heading = style.heading(table, f"queries; {name}")
    return style.finish(figure, heading, [*labels.values(), *map(style.PAPER.format, short.values())])


def _sizes(row: Any) -> tuple[int, int, int]:
    return row.shortlist_dim, row.shortlist_size, row.rerank_dim
