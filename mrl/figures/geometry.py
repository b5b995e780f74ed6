"""The geometry of nested embeddings, drawn: variance and rank by block, maps of prefixes, cosines of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mrl.figures.style import METHOD_STYLES, OTHER_STYLES, Style, add_legend, dim_axis
from mrl.studies.geometry import Blocks

MOST_CLASSES_COLORED = 10
OF_CLASS, RANDOM = "pairs of one class", "random pairs"


def block_statistics(by_run: Mapping[str, Blocks]) -> Figure:
    """Where variance, classes and directions are among the coordinates; a line per run.

    Three panels: variance of a coordinate by block, the share of a block's variance that lies between classes, and
    the effective rank of everything up to a size. A block is called by its last coordinate.

    Args:
        by_run: ``{name: its blocks}``.
    """
    figure = Figure(figsize=(11.4, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    variance, between, rank = figure.subplots(1, 3)
    styles: list[Style] = [METHOD_STYLES["MRL"], METHOD_STYLES["FF"], *OTHER_STYLES]
    for (name, found), style in zip(by_run.items(), styles, strict=False):
        look = {"label": name, "linewidth": 1.6, "markerfacecolor": "white", "markersize": 5, **style}
        variance.plot(found.dims, found.variance, **look)
        between.plot(found.dims, 100 * found.between, **look)
        rank.plot(found.dims, found.prefix_rank, **look)
    dims = sorted({dim for found in by_run.values() for dim in found.dims})
    rank.plot(dims, dims, color="0.6", linewidth=0.8, linestyle=(0, (4, 4)), label="as many as there are dims")
    variance.axhline(1, color="0.6", linewidth=0.8, linestyle=(0, (4, 4)))
    for axes in (variance, between):
        dim_axis(axes, dims)
        axes.set_xlabel("block of coordinates, up to (dims)")
        axes.set_ylim(bottom=0)
    dim_axis(rank, dims)
    rank.set_yscale("log", base=2)
    rank.set_ylim(1, 1.15 * max(4.0, *(float(found.prefix_rank.max()) for found in by_run.values())))
    rank.yaxis.set_major_formatter("{x:g}")
    variance.set_ylabel("variance of a coordinate / mean of all", fontsize=9)
    between.set_ylabel("share between classes (%)", fontsize=9)
    rank.set_ylabel("effective rank of the prefix (directions)", fontsize=9)
    add_legend(figure, [*by_run, "as many as there are dims"])
    return figure


def prefix_maps(maps: Mapping[int, np.ndarray], labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """A panel per size: the images as t-SNE places their prefixes, colored by class.

    Of more than 10 classes the ten with the most images are colored, the rest is gray. Names of one character
    stand beside the middle of their class.

    Args:
        maps: ``{dim: (N, 2)}``.
        labels: ``(N,)`` int64.
        classes: C names.
    """
    figure = Figure(figsize=(2.9 * len(maps), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(maps), squeeze=False)[0]
    counts = np.bincount(labels, minlength=len(classes))
    colored = np.sort(np.argsort(-counts, kind="stable")[:MOST_CLASSES_COLORED])
    for axes, (dim, places) in zip(all_axes, maps.items(), strict=True):
        others = ~np.isin(labels, colored)
        axes.scatter(*places[others].T, s=5, color="0.85", linewidths=0)
        for number, c in enumerate(colored):
            some = places[labels == c]
            axes.scatter(*some.T, s=7, color=f"C{number}", linewidths=0, label=classes[c])
            if len(classes[c]) == 1 and len(some):
                look: dict[str, Any] = {"xytext": (9, 7), "textcoords": "offset points", "fontsize": 11}
                middle = np.median(some, axis=0)
                axes.annotate(classes[c], tuple(middle), color=f"C{number}", fontweight="bold", **look)
        axes.set_title(f"{dim} dims", fontsize=10)
        axes.margins(0.1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("0.8")
    if max(map(len, classes)) > 1:
        add_legend(figure, [classes[c] for c in colored], entry_inches=1.6)
    return figure


def cosine_distributions(cosines: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """A panel per size: how the cosines of pairs of one class and of random pairs are distributed, means dashed.

    Args:
        cosines: ``{dim: (of one class, random)}``.
    """
    figure = Figure(figsize=(2.7 * len(cosines) + 0.3, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(cosines), sharey=True, squeeze=False)[0]
    # Embeddings after a ReLU have no negative cosines.
    low = -1 if min(float(values.min()) for pairs in cosines.values() for values in pairs if len(values)) < -0.01 else 0
    bins = np.linspace(-1, 1, 81)
    for axes, (dim, pairs) in zip(all_axes, cosines.items(), strict=True):
        for label, values, color in zip((OF_CLASS, RANDOM), pairs, ("#0072B2", "#E69F00"), strict=True):
            if len(values):
                _histogram(axes, values, bins, label, color)
        axes.set_title(f"{dim} dims", fontsize=10)
        axes.set_xlabel("cosine")
        axes.set_xlim(low - 0.03, 1.03)
        axes.set_xticks(np.linspace(low, 1, 3))
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("pairs (%)")
    add_legend(figure, [OF_CLASS, RANDOM])
    return figure


def _histogram(axes: Axes, values: np.ndarray, bins: np.ndarray, label: str, color: str) -> None:
    weights = np.full(len(values), 100 / len(values))
    axes.hist(np.clip(values, -1, 1), bins.tolist(), weights=weights, color=color, alpha=0.55, label=label)
    axes.axvline(float(values.mean()), color=color, linewidth=1.4, linestyle="--")
