"""Adaptive classification and retrieval in use: quality against bytes and against measured time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from mrl.figures import style
from mrl.figures.adaptive import SEARCH_STYLES, SINGLE, grow, has_times, search_kinds
from mrl.results import Row
from mrl.studies.adaptive_classification import CascadePoint

METRIC = "map@10"
Series = Mapping[str, tuple[pd.DataFrame, style.Style]]  # {label: (a table with percent, size and costs, style)}


def retrieval_in_use(rows: Sequence[Row], dim: int) -> Figure:
    """Draw quality of retrieval against the bytes that the search keeps in memory and, if `has_times`, against time.

    Bytes are those of one float32 vector at the size that is searched; what reranking reads can stay on disk. Points
    whose search is at ``dim`` are ringed. The rows are of one run.
    """
    table = style.table_of([row for row in rows if row.metric == METRIC], f"metric {METRIC!r}")
    table = table.assign(time=table.ms_per_query, bytes=4 * table.shortlist_dim, size=table.shortlist_dim)
    labels = {"single": SINGLE, "full": "shortlist, reranked at full width", "funnel": "funnel"}
    kinds = search_kinds(table.sort_values("size"))
    series = {labels[kind]: (kinds[kind], SEARCH_STYLES[kind]) for kind in labels if kind in kinds}
    costs = {"bytes": "bytes in memory per database vector", "time": "measured milliseconds per query (CPU)"}
    heading = f"{style.heading(table, 'queries')}, {table.run[0]}; ringed: search at {dim} dims"
    return _draw(series, dim, costs if has_times(table) else {"bytes": costs["bytes"]}, METRIC, heading)


def cascade_in_use(cascades: Sequence[CascadePoint], alone: Sequence[CascadePoint], cap: int, title: str) -> Figure:
    """Draw accuracy of cascades and of single sizes against bytes read and, if times `grow`, time per image.

    The cascade whose largest size is ``cap`` is ringed.
    """
    columns = {"us_per_image": "time", "bytes_per_image": "bytes", "cap": "size"}
    cascade, single = (pd.DataFrame(points).rename(columns=columns) for points in (cascades, alone))
    series = {
        "cascade, by its largest size": (cascade.assign(percent=100 * cascade.top_1), style.METHOD_STYLES["MRL"]),
        "one size": (single.assign(percent=100 * single.top_1), style.METHOD_STYLES["FF"] | {"markersize": 5}),
    }
    [chosen] = cascade[cascade["size"] == cap].itertuples()
    used = f"up to {cap} dims allowed, {chosen.expected_dim:.1f} used on average, {100 * chosen.top_1:.2f}% right"
    costs = {"bytes": "bytes of the embedding read per image, mean"}
    if grow(single.time):
        costs["time"] = "measured microseconds per image, embedding to class (CPU)"
    return _draw(series, cap, costs, "top_1", f"{title}; ringed: {used}")


@rc_context(style.RC)
def _draw(series: Series, ringed: int, costs: Mapping[str, str], metric: str, heading: str) -> Figure:
    """Draw a panel for each of ``costs``, {column: axis label}, with the points of size ``ringed`` in a ring."""
    figure, all_axes = style.panels(len(costs), len(costs), (8.6 / (1 + len(costs)) + 1.4, 3.6), sharey=True)
    for axes, (column, cost) in zip(all_axes, costs.items(), strict=True):
        for label, (points, look) in series.items():
            # Measured times need not rise with the size; a line through them would be a knot.
            joined = {} if points[column].is_monotonic_increasing else {"linestyle": "none"}
            axes.plot(points[column], points.percent, label=label, **look | joined)
            ring = points[points["size"] == ringed]
            axes.plot(ring[column], ring.percent, "o", markersize=15, markerfacecolor="none", color=look["color"])
            for point in points.to_dict("records") if label == SINGLE else ():
                style.annotate(axes, point["size"], (point[column], point["percent"]), (-6, -13))
        style.cost_axis(axes, cost)
    values = pd.concat([points.percent for points, _ in series.values()])
    room = max(0.5, 0.14 * (values.max() - values.min()))
    all_axes[0].set(ylim=(values.min() - room, values.max() + room), ylabel=style.metric_label(metric))
    return style.finish(figure, heading, series)


def size_slider(draw: Callable[[int], Figure], dims: Sequence[int], start: int) -> None:
    """Show ``draw(start)`` and a slider over ``dims`` that redraws it; without a running kernel the picture stays."""
    from IPython.display import display
    from ipywidgets import SelectionSlider

    picture = display(draw(start), display_id=True)
    slider = SelectionSlider(options=list(dims), value=start, description="dims", continuous_update=False)
    slider.observe(lambda change: picture.update(draw(change["new"])), names="value")
    display(slider)
