"""What all figures share: colors, lines and their labels, axes, legend, the paper's values, saving."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from mrl.errors import UserError
from mrl.paper import paper_rows
from mrl.results import Row

Style = dict[str, Any]
# Every function that draws is decorated with `matplotlib.rc_context(RC)`.
RC: Any = {
    **{"axes.axisbelow": True, "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False},
    **{"axes.titlesize": 10, "figure.titlesize": 11, "grid.color": "0.9", "grid.linewidth": 0.7},
    **{"legend.fontsize": 9, "legend.frameon": False, "legend.handlelength": 3.2, "errorbar.capsize": 3},
    **{"lines.linewidth": 1.6, "lines.markerfacecolor": "white", "lines.markersize": 5},
}
BOXED = RC | {"axes.grid": False, "axes.spines.right": True, "axes.spines.top": True, "axes.edgecolor": "0.8"}
# The colors of Okabe and Ito, which color-blind readers can tell apart; markers and dashes do the same in gray.
BLUE, RED, GREEN, ORANGE, SKY, PINK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
METHOD_STYLES: dict[str, Style] = {
    "MRL": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "MRL cascade": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "MRL-E": {"color": RED, "marker": "s", "linestyle": "--"},
    "MRL-E cascade": {"color": RED, "marker": "s", "linestyle": "--"},
    "FF": {"color": "#000000", "marker": "D", "linestyle": ":", "markersize": 7},  # large: others may cover it
    "FF truncated": {"color": GREEN, "marker": "v", "linestyle": "-."},
    "FF PCA": {"color": PINK, "marker": "^", "linestyle": "-"},
    "FF SVD": {"color": SKY, "marker": "P", "linestyle": "--"},
    "FF LDA": {"color": RED, "marker": "d", "linestyle": (0, (3, 1, 1, 1))},
    "FF supervised map": {"color": "#000000", "marker": "p", "linestyle": "-"},
    "FF unsupervised map": {"color": ORANGE, "marker": ">", "linestyle": "-"},
    "FF low-rank classifier": {"color": SKY, "marker": "h", "linestyle": "-"},
    "FF random coordinates": {"color": ORANGE, "marker": "X", "linestyle": ":"},
    "FF random coordinates, probe": {"color": ORANGE, "marker": "*", "linestyle": "--", "markersize": 8},
    "FF random projection": {"color": "#7F7F7F", "marker": "<", "linestyle": "-."},
}
METHOD_LABELS = {"FF": "FF (one model per size)", "FF truncated": "FF, plain truncation"}
_MORE = [to_hex(color) for color in colormaps["tab20b"](range(20))]
OTHER_COLORS = [PINK, SKY, ORANGE, GREEN, "#7F7F7F", *_MORE[::-3], *_MORE[-2::-3], *_MORE[-3::-3]]
PAPER = "{} (paper)"
POINT = ["study", "metric", "group", "dim", "shortlist_dim", "shortlist_size", "rerank_dim"]


class NothingToDraw(UserError):
    """There are no rows for a figure."""


def metric_label(metric: str) -> str:
    """Return the axis label of a metric with its unit, e.g. "mAP@10 (%)" for "map@10"."""
    if metric.startswith("superclass_top_1"):
        return "superclass top-1 accuracy (%)"
    if metric.startswith("top_1"):  # few-shot too
        return "top-1 accuracy (%)"
    return f"{metric.replace('map', 'mAP')} (%)"


def line_labels(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """Return ``{(method, run): label of its line}``, in the order of the legend.

    Runs of one method that differ only in their seed share a line, their mean. If two have the same seed and size, or
    if nested models have different sizes, each run of the method gets a line of its own.
    """
    runs: dict[tuple[Any, ...], set[str]] = {}
    sizes: dict[str, dict[str, set[int | None]]] = {}
    for row in rows:
        runs.setdefault((row.method, row.seed, *(getattr(row, name) for name in POINT)), set()).add(row.run)
        sizes.setdefault(row.method, {}).setdefault(row.run, set()).add(row.dim or row.rerank_dim)
    apart = {point[0] for point, of_point in runs.items() if len(of_point) > 1}
    apart |= {name for name, of in sizes.items() if name[:2] != "FF" and len(set(map(frozenset, of.values()))) > 1}
    order = {method: place for place, method in enumerate(METHOD_STYLES)}
    keys = sorted({(row.method, row.run) for row in rows}, key=lambda key: (order.get(key[0], len(order)), *key))
    names = {method: METHOD_LABELS.get(method, method) for method, _ in keys}
    return {(method, run): f"{names[method]}: {run}" if method in apart else names[method] for method, run in keys}


def line_styles(labels: Mapping[tuple[str, str], str]) -> dict[str, Style]:
    """Return ``{label: style}`` in the order of the legend; a method looks the same in every figure."""
    taken = {METHOD_STYLES[method]["color"] for method, _ in labels if method in METHOD_STYLES}
    colors = itertools.cycle(color for color in OTHER_COLORS if color not in taken)
    others = zip(colors, itertools.cycle("^PX<*h>v"), itertools.cycle(("-", "--", "-.", ":", "--")), strict=False)
    unused, styles = dict(METHOD_STYLES), {}
    for (method, _), label in labels.items():
        if label not in styles:
            own = unused.pop(method, None)
            styles[label] = own or dict(zip(("color", "marker", "linestyle"), next(others), strict=True))
    return styles


def table_of(rows: Sequence[Row], wanted: str) -> pd.DataFrame:
    """Return rows of one dataset as a table in the order of the legend, with two more columns, label and percent."""
    if not rows:
        raise NothingToDraw(f"there are no rows of {wanted}")
    if len(datasets := {row.dataset for row in rows}) > 1:
        raise UserError(f"a figure shows one dataset, but the rows are of {sorted(datasets)}")
    labels = line_labels(rows)
    order = {key: place for place, key in enumerate(labels)}
    ordered = sorted(rows, key=lambda row: order[row.method, row.run])
    more = [{"label": labels[row.method, row.run], "percent": 100 * row.value} for row in ordered]
    return pd.DataFrame([vars(row) | columns for row, columns in zip(ordered, more, strict=True)])


def styles_of(table: pd.DataFrame) -> dict[str, Style]:
    """Return ``{label: style}`` of the lines of a table."""
    return line_styles(dict(zip(zip(table.method, table.run, strict=True), table.label, strict=True)))


def draw_line(
    axes: Axes, points: pd.DataFrame, label: str, look: Style, x: str = "dim", errors: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Draw means over runs in percent against column ``x``, and return them as columns x and y.

    Bars are one standard deviation over runs, or ``errors``, a row for each point, if there is one run. Points whose
    ``x`` does not rise, as measured times may not, are not joined.
    """
    columns = {"x": (x, "mean"), "y": ("percent", "mean"), "dx": (x, "std"), "dy": ("percent", "std")}
    means = points.groupby(POINT, dropna=False).agg(**columns, runs=("run", "size")).fillna(0).reset_index()
    if means.runs.max() == 1 and errors is not None and len(errors) == len(means):
        means["dx"], means["dy"] = errors.sort_values("dim")[[x, "percent"]].to_numpy().T
    first_on_top: Style = {"elinewidth": 1, "zorder": 3 - 0.01 * len(axes.containers)}
    look = first_on_top | look
    if means.dy.any() or means.runs.max() > 1:
        look |= {"yerr": means.dy} | ({"xerr": means.dx} if x == "expected_dim" else {})
    if not means.x.is_monotonic_increasing:
        look |= {"linestyle": "none"}
    axes.errorbar(means.x, means.y, label=label, **look)
    return means


def draw_lines(axes: Axes, table: pd.DataFrame, styles: Mapping[str, Style]) -> None:
    """Draw a line by dim for each label of a table of one metric."""
    for label, points in table.groupby("label", sort=False):
        draw_line(axes, points, label, styles[label])


def paper_beside(rows: Sequence[Row]) -> list[Row]:
    """Return the paper's rows of the same dataset, studies, metrics, methods and numbers of images as ``rows``."""
    kinds = {(row.study, row.metric, row.method, row.n) for row in rows}
    return [row for row in paper_rows(rows[0].dataset) if (row.study, row.metric, row.method, row.n) in kinds]


def draw_paper(axes: Axes, points: Iterable[tuple[float, Row]], label: str, color: str) -> None:
    """Draw the paper's values, rows at places, as a thin dashed line below all others."""
    if ordered := sorted((x, 100 * row.value) for x, row in points):
        look: Style = {"color": color, "linewidth": 1, "dashes": (6, 3), "zorder": 1}
        axes.plot(*zip(*ordered, strict=True), label=PAPER.format(label), **look)


def subplots(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure and its panels ``(rows, columns)``, each of ``size`` (width, height) in inches."""
    figure = Figure(figsize=(size[0] * columns + 0.4, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def dim_axis(axes: Axes, dims: Iterable[float], max_ticks: float = 10) -> None:
    """Make the horizontal axis one of sizes, logarithmic with whole numbers; keep percentages within 0 and 100."""
    *smaller, largest = sorted({int(dim) for dim in dims if not math.isnan(dim)})
    ticks = [largest]
    for dim in reversed(smaller):  # leave out numbers that would overlap
        if math.log2(ticks[-1] / dim) > math.log2(largest / smaller[0]) / max_ticks:
            ticks.append(dim)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("embedding size (dims)")
    low, high = axes.get_ylim()
    margin = 0.02 * (high - low)  # room for the markers at 0 and 100
    axes.set_ylim(max(low, -margin), min(high, 100 + margin))


def cost_axis(axes: Axes, label: str) -> None:
    """Make the horizontal axis a logarithmic one of costs."""
    axes.set_xscale("log")
    costs = np.concatenate([np.asarray(line.get_xdata(), dtype=float) for line in axes.lines])
    wide = costs.max() > 10 * costs.min()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 5, 7), numticks=20))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.margins(x=0.08, y=0.12)


def annotate(axes: Axes, text: Any, place: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """Write ``text`` at ``offset`` points from ``place``."""
    axes.annotate(str(text), place, xytext=offset, textcoords="offset points", **{"fontsize": 7} | look)


def finish(figure: Figure, heading: str, labels: Iterable[str]) -> Figure:
    """Add the title and, below all panels, one legend in the order of ``labels``, and make room for them.

    The title is broken into lines that fit, at "; " first. The legend has as many columns as fit.
    """
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        entries = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True)) | entries
    shown = [label for label in dict.fromkeys(labels) if label in entries]
    width, height = figure.get_size_inches()
    for lines in range(1, len(shown) + 1):
        columns = math.ceil(len(shown) / lines)
        handles = [entries[label] for label in shown]
        legend = figure.legend(handles, shown, loc="outside lower center", ncols=columns)
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            width, height = max(width, box.width / figure.dpi), height + box.height / figure.dpi
            break
        legend.remove()
    figure.set_size_inches(width, height)
    parts = [heading] if len(heading) <= 11 * width else heading.replace("; ", ";\n").split("\n")
    if heading:
        figure.suptitle("\n".join(textwrap.fill(part, round(11 * width)) for part in parts))
    return figure


def counts(table: pd.DataFrame) -> str:
    """Return how many images the rows are of: one number, or "smallest to largest"."""
    return " to ".join(f"{n:,}" for n in sorted({table.n.min(), table.n.max()}))


def seeds_note(table: pd.DataFrame) -> str:
    """Return what the error bars are, for the title; "" if there are none."""
    runs = table.groupby(["label", *POINT], dropna=False).run.nunique()
    low, high = runs.min(), runs.max()
    numbers = str(low) if low == high else f"{low} to {high}"
    return f"; mean and standard deviation of {numbers} seeds" if high > 1 else ""


def save(figure: Figure, path_stem: str | Path) -> list[Path]:
    """Write ``<path_stem>.png`` (200 dpi) and ``<path_stem>.pdf``, and return their paths."""
    paths = [Path(f"{path_stem}{suffix}") for suffix in (".png", ".pdf")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, dpi=200)
    return paths
