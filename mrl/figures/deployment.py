"""Adaptive classification and retrieval in use: quality against measured time and against bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from mrl.errors import UserError
from mrl.figures.style import METHOD_STYLES, NothingToDraw, Style, add_legend, metric_label, title
from mrl.results import Row
from mrl.studies.adaptive_classification import BYTES_PER_NUMBER, CascadePoint

PLAIN, RERANKED, FUNNEL = "one search, no reranking (numbers: its dims)", "shortlist, reranked at full width", "funnel"
STYLES: dict[str, Style] = {
    PLAIN: {"color": "#000000", "marker": "D", "linestyle": ":"},
    RERANKED: {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    FUNNEL: {"color": "#D55E00", "marker": "*", "linestyle": "none", "markersize": 9},
}
LINE: dict[str, Any] = {"markersize": 5, "linewidth": 1.4, "markerfacecolor": "white"}
CHOSEN: dict[str, Any] = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "linestyle": "none"}


def retrieval_in_use(rows: Sequence[Row], dim: int, metric: str = "map@10") -> Figure:
    """Quality of retrieval against measured milliseconds, and against the bytes that the search keeps in memory.

    Bytes are those of one vector in float32 at the size that is searched; what reranking reads can stay on disk.
    The points whose search is at ``dim`` are ringed.

    Args:
        rows: Of one run, from `mrl.studies.adaptive_retrieval`.
        dim: Size of the search to look at.
        metric: "map@10" or "top_1".

    Raises:
        UserError: There is nothing to draw, or times were not measured.
    """
    rows = [row for row in rows if row.shortlist_dim is not None and row.metric == metric]
    if not rows:
        raise NothingToDraw(f"there are no rows of adaptive retrieval with the metric {metric}")
    if any(row.ms_per_query is None for row in rows):
        raise UserError("these rows have no measured time; adaptive_retrieval measures it on the CPU")
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    by_time, by_bytes = figure.subplots(1, 2, sharey=True)
    for label, points in _series(rows).items():
        values = [100 * row.value for row in points]
        for axes, costs in (
            (by_time, [row.ms_per_query for row in points]),
            (by_bytes, [BYTES_PER_NUMBER * (row.shortlist_dim or 0) for row in points]),
        ):
            # Times are measured, and jump to and fro: a line through them would be a knot.
            joined = {} if axes is by_bytes else {"linestyle": "none"}
            axes.plot(costs, values, label=label, **LINE | STYLES[label] | joined)
            ringed = [i for i, row in enumerate(points) if row.shortlist_dim == dim]
            ring = CHOSEN | {"color": STYLES[label]["color"], "label": f"_{label}"}
            axes.plot([costs[i] for i in ringed], [values[i] for i in ringed], **ring)
            if label == PLAIN:
                _number(axes, [str(row.shortlist_dim) for row in points], costs, values)
    _cost_axis(by_time, "measured milliseconds per query (CPU)")
    _cost_axis(by_bytes, "bytes in memory per database vector")
    by_time.set_ylabel(metric_label(metric))
    title(figure, f"{rows[0].dataset}, {rows[0].run}: {rows[0].n:,} queries; ringed: search at {dim} dims")
    _room(by_time)
    add_legend(figure, list(STYLES), entry_inches=3.0)
    return figure


def cascade_in_use(cascades: Sequence[CascadePoint], alone: Sequence[CascadePoint], cap: int, heading: str) -> Figure:
    """Accuracy of the cascade and of single sizes against measured microseconds and bytes read, per image.

    Args:
        cascades: See `mrl.studies.adaptive_classification.cascade_points`.
        alone: Likewise.
        cap: The cascade to look at, by its largest size; its points are ringed.
        heading: What the images are, for the title.
    """
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    by_time, by_bytes = figure.subplots(1, 2, sharey=True)
    labels = {"cascade, by its largest size": (cascades, METHOD_STYLES["MRL"]), "one size": (alone, STYLES[PLAIN])}
    for label, (points, style) in labels.items():
        values = [100 * point.top_1 for point in points]
        for axes, name in ((by_time, "us_per_image"), (by_bytes, "bytes_per_image")):
            costs = [getattr(point, name) for point in points]
            axes.plot(costs, values, label=label, **LINE | style)
            ringed = [i for i, point in enumerate(points) if point.cap == cap]
            ring = CHOSEN | {"color": style["color"], "label": f"_{label}"}
            axes.plot([costs[i] for i in ringed], [values[i] for i in ringed], **ring)
    _cost_axis(by_time, "measured microseconds per image, embedding to class (CPU)")
    _cost_axis(by_bytes, "bytes of the embedding read per image, mean")
    by_time.set_ylabel("top-1 accuracy (%)")
    [chosen] = [point for point in cascades if point.cap == cap] or [cascades[-1]]
    used = f"up to {chosen.cap} dims allowed, {chosen.expected_dim:.1f} used on average"
    title(figure, f"{heading}; ringed: {used}, {100 * chosen.top_1:.2f}% right")
    _room(by_time)
    add_legend(figure, list(labels), entry_inches=2.8)
    return figure


def size_slider(draw: Callable[[int], Figure], dims: Sequence[int], start: int) -> None:
    """Show ``draw(start)``, and below it a slider over ``dims`` that draws it anew in place.

    Where nothing is interactive (a page, a printout) the picture alone stays.

    Raises:
        UserError: ``start`` is not one of ``dims``, or ipywidgets is not installed.
    """
    if start not in dims:
        raise UserError(f"start is {start}; allowed are the sizes {list(dims)}")
    try:
        from IPython.display import display
        from ipywidgets import SelectionSlider
    except ImportError as error:
        raise UserError("a slider needs ipywidgets: pip install ipywidgets") from error
    picture = display(draw(start), display_id=True)
    slider = SelectionSlider(options=list(dims), value=start, description="dims", continuous_update=False)
    slider.observe(lambda change: picture.update(draw(change["new"])), names="value")
    display(slider)


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by label, smallest search first: full-width shortlists of one length, plain searches, funnels."""
    pairs = [row for row in rows if row.study == "adaptive_retrieval"]
    full = max(row.rerank_dim or 0 for row in rows)
    plain = [row for row in pairs if row.shortlist_dim == row.rerank_dim]
    size = plain[0].shortlist_size if plain else None
    of_label = {
        PLAIN: plain,
        RERANKED: [
            row for row in pairs if row.rerank_dim == full and row.shortlist_size == size and row.shortlist_dim != full
        ],
        FUNNEL: [row for row in rows if row.study == "funnel_retrieval"],
    }
    return {label: sorted(some, key=lambda row: row.shortlist_dim or 0) for label, some in of_label.items() if some}


def _number(axes: Axes, numbers: Sequence[str], costs: Sequence[Any], values: Sequence[float]) -> None:
    """Write each number below its point."""
    for number, cost, value in zip(numbers, costs, values, strict=True):
        place: Any = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center", "fontsize": 7}
        axes.annotate(number, (cost, value), **place)


def _room(axes: Axes) -> None:
    """Room above and below; where all values are one, half a point of it."""
    axes.margins(y=0.14)
    low, high = axes.get_ylim()
    if high - low < 0.01 or low < 0 or high > 101:
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
        axes.set_ylim(values.min() - 0.5, min(values.max() + 0.5, 100.2))


def _cost_axis(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    costs = np.concatenate([np.asarray(line.get_xdata(), dtype=float) for line in axes.lines])
    wide = costs.max() > 10 * costs.min()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 5, 7), numticks=20))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.margins(x=0.1)
    axes.grid(True, color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
