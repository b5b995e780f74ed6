"""What all figures share: colors, markers, axes of sizes, the legend, saving."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from mrl.errors import UserError
from mrl.results import Row, method_order

Line = dict[int, list[float]]
Style = dict[str, Any]

METRIC_LABELS = {"top_1": "top-1 accuracy (%)", "top_5": "top-5 accuracy (%)"}
METRIC_NAMES = {"map": "mAP", "precision": "precision", "recall": "recall"}
METHOD_LABELS = {"FF": "FF (one model per size)", "FF truncated": "FF, plain truncation"}
# Colors of Okabe and Ito, which the color-blind can tell apart; marker and line style tell the same in gray.
METHOD_STYLES: dict[str, Style] = {
    "MRL": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "MRL-E": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    # Larger, since it lies under the others where all agree.
    "FF": {"color": "#000000", "marker": "D", "linestyle": ":", "markersize": 8},
    "FF truncated": {"color": "#009E73", "marker": "v", "linestyle": "-."},
    # Of one kind, one color: singular vectors, random coordinates.
    "FF PCA": {"color": "#CC79A7", "marker": "^", "linestyle": "-"},
    "FF SVD": {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
    "FF low-rank classifier": {"color": "#56B4E9", "marker": "h", "linestyle": "-"},
    "FF random coordinates": {"color": "#E69F00", "marker": "X", "linestyle": ":"},
    "FF random coordinates, probe": {"color": "#E69F00", "marker": "*", "linestyle": "--", "markersize": 8},
    "FF random projection": {"color": "#7F7F7F", "marker": "<", "linestyle": "-."},
}
OTHER_STYLES: list[Style] = [
    {"color": color, "marker": marker, "linestyle": linestyle}
    for color, marker, linestyle in zip(
        ("#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#0072B2", "#D55E00", "#009E73"),
        ("^", "P", "X", "<", "*", "h", ">"),
        ("-", "--", "-.", ":", "--", "-.", "-"),
        strict=True,
    )
]
PAPER = "{} (paper)"
MAX_TICKS = 12


class NothingToDraw(UserError):
    """None of the rows belongs into the figure."""


def metric_label(metric: str) -> str:
    """The axis label of a metric, with its unit: "mAP@10 (%)" for "map@10"."""
    if metric.endswith("_shot"):
        return METRIC_LABELS["top_1"]
    name, at, k = metric.partition("@")
    return METRIC_LABELS.get(metric, f"{METRIC_NAMES.get(name, name)}{at}{k} (%)")


def add_legend(figure: Figure, labels: Sequence[str], entry_inches: float = 2.2) -> None:
    """One legend below all panels, an entry a label, in this order; as many beside each other as fit."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    shown = [label for label in dict.fromkeys(labels) if label in entries]
    figure.legend(
        [entries[label] for label in shown],
        shown,
        loc="outside lower center",
        ncols=min(len(shown), int(figure.get_figwidth() // entry_inches)),
        frameon=False,
        fontsize=9,
        handlelength=3.2,
    )


def title(figure: Figure, text: str) -> None:
    """Write ``text`` over all panels, on as many lines as the figure's width makes necessary, broken at "; " first."""
    width = round(11 * figure.get_figwidth())
    parts = [text] if len(text) <= width else text.replace("; ", ";\n").split("\n")
    figure.suptitle("\n".join(textwrap.fill(part, width) for part in parts), fontsize=11)


def draw_paper(axes: Axes, points: Iterable[tuple[float, float]], label: str, style: Style) -> None:
    """The paper's values as a thin dashed line in the color of ours, under all others; nothing if there are none."""
    if in_order := sorted(points):
        look: dict[str, Any] = {"color": style["color"], "linewidth": 1, "dashes": (6, 3), "zorder": 1}
        axes.plot(*zip(*in_order, strict=True), label=PAPER.format(label), **look)


def save(figure: Figure, path_stem: str | Path) -> list[Path]:
    """The paths of ``<path_stem>.png`` (200 dpi) and ``<path_stem>.pdf``, after writing ``figure`` to them."""
    paths = [Path(f"{path_stem}{suffix}") for suffix in (".png", ".pdf")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, dpi=200)
    return paths


def line_labels(
    rows: Sequence[Row],
    names: Mapping[str, str] = METHOD_LABELS,
    order: Callable[[str], tuple[int, str]] = method_order,
) -> dict[tuple[str, str], str]:
    """``{(method, run): label of its line}``: the method, and the run too where several models are not one line.

    Models of one method that differ in their seed alone are: the line is their mean. Two of one seed and size are
    not, nor are nested ones of different sizes.

    Args:
        rows: All that are to be drawn.
        names: What methods are called, where not as they are.
        order: Sort key of methods.
    """
    points = Counter((row.method, row.study, row.metric, row.dim, row.seed) for row in rows)
    apart = {point[0] for point, count in points.items() if count > 1}
    sizes: dict[str, dict[str, set[int | None]]] = {}
    for row in rows:
        sizes.setdefault(row.method, {}).setdefault(row.run, set()).add(row.dim)
    for method, of_runs in sizes.items():
        if not method.startswith("FF") and len(set(map(frozenset, of_runs.values()))) > 1:
            apart.add(method)
    labels = {}
    for method, run in sorted({(row.method, row.run) for row in rows}, key=lambda key: (*order(key[0]), key[1])):
        name = names.get(method, method)
        labels[method, run] = f"{name}: {run}" if method in apart else name
    return labels


def line_styles(labels: Mapping[tuple[str, str], str], styles: Mapping[str, Style] = METHOD_STYLES) -> dict[str, Style]:
    """``{label: style}`` in the order of the legend; a method has the same of ``styles`` in every figure."""
    spare = itertools.cycle(OTHER_STYLES)
    found: dict[str, Style] = {}
    used: set[str] = set()
    for (method, _), label in labels.items():
        if label not in found:
            found[label] = styles[method] if method in styles.keys() - used else next(spare)
            used.add(method)
    return found


def values_by_dim(rows: Sequence[Row], labels: Mapping[tuple[str, str], str]) -> dict[str, Line]:
    """``{label: {dim: one value per seed}}`` of one study."""
    lines: dict[str, Line] = {}
    for row in rows:
        if row.dim is not None:
            lines.setdefault(labels[row.method, row.run], {}).setdefault(row.dim, []).append(row.value)
    return lines


def draw_line(axes: Axes, line: Line, label: str, style: Style) -> None:
    """Mean in percent by dim, with one standard deviation as bars where there are several seeds."""
    dims = sorted(line)
    means = [100 * statistics.mean(line[dim]) for dim in dims]
    look: dict[str, Any] = {"label": label, "linewidth": 1.6, "markersize": 5, "markerfacecolor": "white", **style}
    look["zorder"] = 3 - 0.01 * len(axes.lines)  # the first of the legend on top
    if max(map(len, line.values())) == 1:
        axes.plot(dims, means, **look)
        return
    spread = [100 * statistics.stdev(line[dim]) if len(line[dim]) > 1 else 0.0 for dim in dims]
    axes.errorbar(dims, means, yerr=spread, capsize=3, elinewidth=1, **look)


def dim_axis(axes: Axes, dims: Sequence[int]) -> None:
    """A logarithmic axis of sizes with whole numbers, and what else every accuracy panel has in common."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(dims)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("embedding size (dims)")
    low, high = axes.get_ylim()
    margin = 0.02 * (high - low)  # room for the markers at 0 and 100
    axes.set_ylim(max(low, -margin), min(high, 100 + margin))
    axes.grid(True, color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(dims: Sequence[int]) -> list[int]:
    """The sizes that get a number on the axis: the largest, and those far enough from the next one to be read."""
    nearest = math.log2(dims[-1] / dims[0]) / MAX_TICKS
    ticks = [dims[-1]]
    for dim in reversed(dims[:-1]):
        if math.log2(ticks[-1] / dim) > nearest:
            ticks.append(dim)
    return ticks[::-1]


def counts(rows: Sequence[Row]) -> str:
    """How many images the rows are of: one number, or smallest to largest."""
    return " to ".join(f"{n:,}" for n in sorted({min(row.n for row in rows), max(row.n for row in rows)}))


def seeds_note(rows: Sequence[Row], labels: Mapping[tuple[str, str], str]) -> str:
    """What the error bars are, for the title; nothing where there are none."""
    seeds = set(Counter((row.study, row.metric, labels[row.method, row.run], row.dim) for row in rows).values())
    if seeds == {1}:
        return ""
    return f"; mean and standard deviation of {min(seeds)}{f' to {max(seeds)}' if len(seeds) > 1 else ''} seeds"


def dataset_of(rows: Sequence[Row], wanted: str) -> str:
    """The one dataset that ``rows`` are of.

    Raises:
        UserError: They are of several, or there are none; ``wanted`` says what was looked for.
    """
    datasets = sorted({row.dataset for row in rows})
    if len(datasets) != 1:
        if not datasets:
            raise NothingToDraw(f"one figure shows one dataset, but was given no rows of {wanted}")
        raise UserError(f"one figure shows one dataset, but was given rows of several datasets: {datasets}")
    return datasets[0]
