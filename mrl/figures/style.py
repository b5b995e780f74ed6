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
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from mrl.errors import UserError
from mrl.paper import paper_rows
from mrl.results import METHODS, Row, data_title, span

Style = dict[str, Any]
# Every function that draws is decorated with `matplotlib.rc_context(RC)`.
RC: Any = {
    **{"axes.axisbelow": True, "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False},
    **{"axes.titlesize": 10, "figure.titlesize": 11, "grid.color": "0.9", "grid.linewidth": 0.7},
    **{"figure.constrained_layout.w_pad": 0.1},
    **{"legend.fontsize": 9, "legend.frameon": False, "legend.handlelength": 3.2, "errorbar.capsize": 3},
    **{"lines.linewidth": 1.6, "lines.markerfacecolor": "white", "lines.markersize": 5},
    "text.parse_math": False,  # a class may be called $5_to_$10
}
BOXED = RC | {"axes.grid": False, "axes.spines.right": True, "axes.spines.top": True, "axes.edgecolor": "0.8"}
# The colors of Okabe and Ito, which color-blind readers can tell apart, then darker ones; markers do the same in gray.
BLUE, RED, GREEN, ORANGE, SKY, PINK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
WINE, INDIGO, OLIVE, BROWN, GRAY, BLACK = "#882255", "#332288", "#999933", "#8C510A", "#7F7F7F", "#000000"
_LOOKS = {
    **dict.fromkeys(("MRL", "MRL cascade"), (BLUE, "o", "-")),
    **dict.fromkeys(("MRL weighted", "MRL weighted cascade"), (SKY, "8", "-")),
    **dict.fromkeys(("MRL distilled", "MRL distilled cascade"), (INDIGO, "H", "-")),
    **dict.fromkeys(("MRL-E", "MRL-E cascade"), (RED, "s", "--")),
    **dict.fromkeys(("MRL-E scaled", "MRL-E scaled cascade"), ("#B8860B", "+", "--")),
    **dict.fromkeys(("MRL-E distilled", "MRL-E distilled cascade"), ("#B2182B", "x", "--")),
    "FF": (BLACK, "D", ":"),
    "FF truncated": (GREEN, "v", "-."),
    "FF PCA": (PINK, "^", "-"),
    "FF SVD": ("#AA4499", "P", "--"),
    "FF LDA": (WINE, "d", (0, (3, 1, 1, 1))),
    "FF supervised map": ("#117733", "p", "-"),
    "FF unsupervised map": (ORANGE, ">", "-"),
    "FF low-rank classifier": (BROWN, "h", "-"),
    "FF random coordinates": (OLIVE, "X", ":"),
    "FF random coordinates, probe": ("#44AA99", "*", "--"),
    "FF random projection": (GRAY, "<", "-."),
}
METHOD_STYLES: dict[str, Style] = {
    name: dict(zip(("color", "marker", "linestyle"), look, strict=True)) for name, look in _LOOKS.items()
}
METHOD_STYLES["FF"]["markersize"] = 7  # large: others may cover it
_TRAINED_WITH = {"scaled": "scaled", "weighted": "weighted loss", "distilled": "self-distillation"}
METHOD_LABELS = {
    **{
        f"{method} {word}{cascade}": f"{method}{cascade}, {label}"
        for method in ("MRL", "MRL-E")
        for word, label in _TRAINED_WITH.items()
        for cascade in ("", " cascade")
    },
    "FF": "FF (one model per size)",
    "FF truncated": "FF, plain truncation",
}
OTHER_COLORS = [SKY, ORANGE, PINK, GREEN, GRAY, WINE, INDIGO, OLIVE, BROWN, "#44AA99", "#117733", "#AA4499", "#DDCC77"]
PAPER = "{} (paper)"
INCHES_PER_DIGIT = 0.09  # of tick labels
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


def is_model(method: str) -> bool:
    """Whether rows of a method are of a trained model at its sizes, or cut to them, and of no baseline."""
    return method.startswith("MRL") or method in METHODS


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


def table_of(rows: Sequence[Row], wanted: str) -> pd.DataFrame:
    """Return rows of one dataset as a table in the order of the legend, with a column label and values in percent.

    Rows of standard deviations over random splits ("top_1_std") become the columns split_x (of the expected dim) and
    split_y (in percent) of their rows.
    """
    stds = {(row.method, row.run, row.metric, row.dim): row for row in rows if row.metric.endswith("_std")}
    rows = [row for row in rows if not row.metric.endswith("_std")]
    if not rows:
        raise NothingToDraw(f"there are no rows of {wanted}")
    if len(datasets := {row.dataset for row in rows}) > 1:
        raise UserError(f"a figure shows one dataset, but the rows are of {sorted(datasets)}")
    labels = line_labels(rows)
    order = {key: place for place, key in enumerate(labels)}
    records = []
    for row in sorted(rows, key=lambda row: order[row.method, row.run]):
        std = stds.get((row.method, row.run, f"{row.metric}_std", row.dim))
        split = (std.expected_dim or 0.0, 100 * std.value) if std else (0.0, 0.0)
        more = {"label": labels[row.method, row.run], "percent": 100 * row.value}
        records.append(vars(row) | more | dict(zip(("split_x", "split_y"), split, strict=True)))
    return pd.DataFrame(records)


def styles_of(table: pd.DataFrame) -> dict[str, Style]:
    """Return ``{label: style}`` of the lines of a table, in its order, each in a color of its own.

    A method looks the same in every figure; its further runs have the colors that no method of the table has.
    """
    lines = table[["method", "label"]].drop_duplicates()
    first = lines.drop_duplicates("method")
    own = {line.label: METHOD_STYLES[line.method] for line in first.itertuples() if line.method in METHOD_STYLES}
    others = [label for label in lines.label if label not in own]
    own |= zip(others, more_looks(len(others), first.method), strict=True)
    return {label: own[label] for label in lines.label}


def more_looks(number: int, methods: Iterable[str]) -> list[Style]:
    """Return ``number`` styles in colors that neither the ``methods`` nor each other have."""
    taken = {METHOD_STYLES[method]["color"] for method in methods if method in METHOD_STYLES}
    colors = [color for color in OTHER_COLORS if color not in taken]
    if number > len(colors):
        colors = [to_hex(color) for color in colormaps["turbo"](np.linspace(0, 1, number))]
    looks = zip(colors[:number], itertools.cycle("^PX<*h>v"), itertools.cycle(("-", "--", "-.", ":")), strict=False)
    return [dict(color=color, marker=marker, linestyle=line) for color, marker, line in looks]


def draw_line(axes: Axes, points: pd.DataFrame, label: str, look: Style, x: str = "dim") -> pd.DataFrame:
    """Draw means over runs in percent against column ``x``, and return them as columns x and y.

    Bars are one standard deviation over runs or, of one run, over its random splits. Points whose ``x`` does not rise,
    as measured times may not, are not joined.
    """
    columns = {"x": (x, "mean"), "y": ("percent", "mean"), "dx": (x, "std"), "dy": ("percent", "std")}
    columns |= {"split_x": ("split_x", "first"), "split_y": ("split_y", "first")}
    means = points.groupby(POINT, dropna=False).agg(**columns, runs=("run", "size")).fillna(0).reset_index()
    if means.runs.max() == 1:
        means["dx"], means["dy"] = means.split_x, means.split_y
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


def panels(number: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, list[Any]]:
    """Return a figure and ``number`` panels, each of ``size`` (width, height) in inches, in rows of ``columns``."""
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(size[0] * columns + 0.4, size[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in grid.flat[number:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:number])


def dim_axis(axes: Axes, dims: Iterable[float]) -> None:
    """Make the horizontal axis one of sizes, logarithmic, with the numbers for which there is room; 0 to 100 percent.

    The largest size has a number, then the smallest, then others from right to left.
    """
    sizes = sorted({int(dim) for dim in dims if not math.isnan(dim)}, reverse=True)
    inches = 0.9 * axes.get_window_extent().width / axes.figure.dpi
    per_octave = inches / math.log2(max(2, sizes[0] / sizes[-1]))

    def apart(a: int, b: int) -> bool:
        return per_octave * abs(math.log2(a / b)) > INCHES_PER_DIGIT * (len(f"{a}{b}") / 2 + 1)

    ticks = sizes[:1]
    for dim in sizes[1:]:
        if apart(dim, ticks[-1]) and (dim == sizes[-1] or apart(dim, sizes[-1])):
            ticks.append(dim)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("embedding size (dims)")
    _limit_percents(axes)


def cost_axis(axes: Axes, label: str) -> None:
    """Make the horizontal axis a logarithmic one of costs."""
    axes.set_xscale("log")
    costs = np.concatenate([np.asarray(line.get_xdata(), dtype=float) for line in axes.lines])
    usual = LogLocator(subs=(1, 2, 5) if costs.max() > 10 * costs.min() else (1, 1.5, 2, 3, 5, 7), numticks=20)
    axes.xaxis.set_major_locator(usual if costs.max() > 2 * costs.min() else MaxNLocator(6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.margins(x=0.08, y=0.12)
    _limit_percents(axes)


def _limit_percents(axes: Axes) -> None:
    """Cut the vertical axis at 0 and 100, with room for the markers there."""
    low, high = axes.get_ylim()
    margin = (high - low) * axes.figure.dpi / 16 / axes.get_window_extent().height  # 1/16 inch
    axes.set_ylim(max(low, -margin), min(high, 100 + margin))


def annotate(axes: Axes, text: Any, place: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """Write ``text``, readable on lines and markers, at ``offset`` points from ``place``."""
    outline: Any = {"path_effects": [patheffects.withStroke(linewidth=2, foreground="white")], "zorder": 10}
    axes.annotate(str(text), place, xytext=offset, textcoords="offset points", **{"fontsize": 7} | outline | look)


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
    room = round(11 * width)  # characters of a line
    parts = [part if len(part) > room else part.replace(" ", "\N{NO-BREAK SPACE}") for part in heading.split("; ")]
    if heading:
        figure.suptitle(textwrap.fill("; ".join(parts), room).replace("\N{NO-BREAK SPACE}", " "))
    return figure


def heading(table: pd.DataFrame, images: str = "images") -> str:
    """Return the title of a figure: the data, the number of images, and what its error bars are, if it has some."""
    return f"{data_title(table.dataset.iloc[0])}: {span(table.n)} {images}{bars_note(table)}"


def bars_note(table: pd.DataFrame) -> str:
    """Return what the error bars are, for the title; "" if there are none."""
    runs = table.groupby(["label", *POINT], dropna=False).run.nunique()
    over = f"of {span(runs)} seeds" if runs.max() > 1 else "over random splits" if table.split_y.any() else ""
    return over and f"; mean and standard deviation {over}"


def save(figure: Figure, path_stem: str | Path) -> list[Path]:
    """Write ``<path_stem>.png`` (200 dpi) and ``<path_stem>.pdf``, and return their paths."""
    paths = [Path(f"{path_stem}{suffix}") for suffix in (".png", ".pdf")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, dpi=200)
    return paths
