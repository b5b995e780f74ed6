"""The charts of the W&B workspace as one picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mrl.figures import style

LINES = ("-", (0, (2, 1)), ":", "-.")
COLORS = (style.BLUE, style.RED, style.BLACK, *style.OTHER_COLORS)
SMALL = {"axes.titlesize": 9, "axes.labelsize": 8, "legend.fontsize": 7, "lines.linewidth": 1.3}


@rc_context(style.RC | SMALL | {"xtick.labelsize": 8, "ytick.labelsize": 8, "lines.markerfacecolor": "none"})
def dashboard(points: pd.DataFrame, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> Figure:
    """Draw a row of charts for each section.

    Args:
        points: What runs logged, a row for each value: run, method, metric, x (the training step, or the dim of an
            evaluation), value.
        charts: ``{section: {title: metrics}}``; a metric that ends with "/" is a line for every prefix, and a title
            with "by method" is a mean over runs.
    """
    figure = Figure(figsize=(11, 2.3 * len(charts)), layout="constrained")
    parts = figure.subfigures(len(charts), 1, squeeze=False).flat
    for part, (section, titles) in zip(parts, charts.items(), strict=True):
        part.suptitle(section, x=0.01, ha="left", weight="bold")
        for axes, (title, metrics) in zip(part.subplots(1, len(titles)), titles.items(), strict=True):
            prefixes = "[0-9]+" if metrics[0].endswith("/") else ""
            pattern = "|".join(re.escape(metric) + prefixes for metric in metrics)
            names = {"method" if "by method" in title else "run": "name"}
            shown = points[points.metric.str.fullmatch(pattern)].rename(columns=names)
            (_draw_prefixes if prefixes else _draw_metrics)(axes, shown)
            by_dim = metrics[0].startswith("eval/")
            axes.set(title=title, xlabel="dim" if by_dim else "training step")
            if by_dim:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:g}")
            if len(shown):
                axes.legend(**{"loc": "center left", "bbox_to_anchor": (1, 0.5)} if prefixes else {})
    return figure


def _draw_prefixes(axes: Axes, shown: pd.DataFrame) -> None:
    """Draw a line for each run and prefix, in the color of its size."""
    shown = shown.assign(dim=shown.metric.str.rsplit("/").str[-1].astype(int))
    dims, names = sorted(shown.dim.unique()), list(shown["name"].unique())
    for (name, dim), line in shown.groupby(["name", "dim"]):
        color = colormaps["viridis"](0.92 * dims.index(dim) / max(1, len(dims) - 1))
        look = LINES[names.index(name) % len(LINES)]
        axes.plot(line.groupby("x").value.mean(), label=f"{name} {dim}", color=color, linestyle=look)


def _draw_metrics(axes: Axes, shown: pd.DataFrame) -> None:
    """Draw a line for each run or method and metric; markers show lines of one point."""
    for place, ((name, metric), line) in enumerate(shown.groupby(["name", "metric"], sort=False)):
        label = name if shown.metric.nunique() < 2 else f"{name} {metric.removeprefix('eval/')}"
        look: style.Style = {"color": COLORS[place % len(COLORS)], "linestyle": LINES[place % len(LINES)]}
        if metric.startswith("eval/"):
            look |= {"marker": "oDsv"[place % 4], "markersize": 4 + 2 * place}
        axes.plot(line.groupby("x").value.mean(), label=label, **look)
