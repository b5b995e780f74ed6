"""What is in a prefix: blocks of coordinates, maps, cosines, groups of classes, confusions, dims that a class needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mrl.figures import style
from mrl.results import Row
from mrl.studies.geometry import Blocks
from mrl.studies.hierarchy import sizes_needed

MAX_COLORED = 20
MAX_NAMED = 20
KNOWLEDGE = "prefix_knowledge"
LINES: dict[tuple[str, str], tuple[str, style.Style]] = {
    (KNOWLEDGE, "superclass_top_1"): ("right group, 1-NN", {"color": style.GREEN, "marker": "s"}),
    (KNOWLEDGE, "shuffled_superclass_top_1"): (
        "right group, 1-NN, were groups random",
        {"color": style.ORANGE, "marker": "v", "ls": ":"},
    ),
    (KNOWLEDGE, "top_1"): ("right class, 1-NN", {"color": style.BLUE, "marker": "o"}),
    ("classification", "top_1"): ("right class, linear classifier", {"color": "black", "marker": "x", "ls": "--"}),
}
BINS: list[float] = np.linspace(-1, 1, 81).tolist()
AS_MANY = "as many as there are dims"


@rc_context(style.RC)
def block_statistics(by_run: Mapping[str, Blocks], title: str = "") -> Figure:
    """Draw where variance, classes and directions are among the coordinates; a line per run.

    Three panels: variance of a coordinate by block, the share of a block's variance that lies between classes, and
    the effective rank of everything up to a size. A block is named by its last coordinate.
    """
    figure, [variance, between, rank] = style.panels(3, 3, (3.7, 3.6))
    dims = sorted({dim for found in by_run.values() for dim in found.dims})
    looks = [style.METHOD_STYLES["MRL"], style.METHOD_STYLES["FF"], *style.more_looks(len(by_run), ["MRL", "FF"])]
    for (name, found), look in zip(by_run.items(), looks, strict=False):
        variance.plot(found.dims, found.variance, label=name, **look)
        between.plot(found.dims, 100 * found.between, **look)
        rank.plot(found.dims, found.prefix_rank, **look)
    reference: style.Style = {"color": "0.6", "linewidth": 0.8, "linestyle": (0, (4, 4))}
    rank.plot(dims, dims, label=AS_MANY, **reference)
    variance.axhline(1, **reference)
    for axes in (variance, between, rank):
        style.dim_axis(axes, dims)
    rank.set_yscale("log", base=2)
    rank.yaxis.set_major_formatter("{x:g}")
    highest = max(4.0, *(float(found.prefix_rank.max()) for found in by_run.values()))
    rank.set(ylim=(1, 1.15 * highest), ylabel="effective rank of the prefix (directions)")
    variance.set(ylim=(0, None), ylabel="variance of a coordinate / mean of all")
    between.set(ylim=(0, 1.05 * between.get_ylim()[1]), ylabel="share between classes (%)")
    for axes in (variance, between):
        axes.set_xlabel("block of coordinates, up to (dims)")
    return style.finish(figure, title, [*by_run, AS_MANY])


@rc_context(style.BOXED | {"legend.markerscale": 3})
def prefix_maps(maps: Mapping[int, np.ndarray], labels: np.ndarray, names: Sequence[str], title: str = "") -> Figure:
    """Draw maps ``{dim: (N, 2)}`` of N images, colored by class or group; of more than 20, those with the most images.

    If all names are of one character, each is written beside the middle of its class.
    """
    figure, all_axes = style.panels(len(maps), len(maps), (2.85, 3.1))
    sizes = np.bincount(labels, minlength=len(names))
    colored = np.sort(np.argsort(-sizes, kind="stable")[: min(MAX_COLORED, (sizes > 0).sum())])
    colors = colormaps["tab10" if len(colored) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    short = max(map(len, names)) == 1
    for axes, (dim, places) in zip(all_axes, maps.items(), strict=True):
        axes.scatter(*places[~np.isin(labels, colored)].T, s=5, color="0.85", linewidths=0)
        for c, color in zip(colored, colors, strict=False):
            some = places[labels == c]
            axes.scatter(*some.T, s=7, color=color, linewidths=0, label=names[c])
            if short and len(some):
                middle = tuple(np.median(some, axis=0))
                style.annotate(axes, names[c], middle, (9, 7), fontsize=11, color=color, fontweight="bold")
        axes.set(title=f"{dim} dims", xticks=[], yticks=[])
        axes.margins(0.1)
    if len(colored) < (sizes > 0).sum():
        title += f"; colored: the {len(colored)} of {(sizes > 0).sum()} with the most images"
    return style.finish(figure, title, [] if short else [names[c] for c in colored])


@rc_context(style.RC | {"axes.grid": False})
def cosine_distributions(cosines: Mapping[int, tuple[np.ndarray, np.ndarray]], title: str = "") -> Figure:
    """Draw the distributions of ``{dim: (cosines of pairs of one class, of random pairs)}``, with dashed means."""
    figure, all_axes = style.panels(len(cosines), len(cosines), (2.65, 3.0), sharey=True)
    kinds = {"pairs of one class": style.BLUE, "random pairs": style.ORANGE}
    # Embeddings after a ReLU have no negative cosines.
    low = -1 if min(values.min(initial=0) for pairs in cosines.values() for values in pairs) < -0.01 else 0
    for axes, (dim, pairs) in zip(all_axes, cosines.items(), strict=True):
        for (label, color), values in zip(kinds.items(), pairs, strict=True):
            if len(values):
                look: style.Style = {"color": color, "alpha": 0.55, "label": label}
                axes.hist(values.clip(-1, 1), BINS, weights=np.full(len(values), 100 / len(values)), **look)
                axes.axvline(values.mean(), color=color, linewidth=1.4, linestyle="--")
        axes.set(title=f"{dim} dims", xlabel="cosine", xlim=(low - 0.03, 1.03), xticks=np.linspace(low, 1, 3))
    all_axes[0].set_ylabel("pairs (%)")
    return style.finish(figure, title, kinds)


@rc_context(style.RC)
def accuracy_of_groups_and_classes(rows: Sequence[Row], trained: Sequence[int]) -> Figure:
    """Draw accuracy of groups of classes and of classes by size, of one run; markers of trained sizes are filled."""
    table = style.table_of([row for row in rows if (row.study, row.metric) in LINES], "what a prefix knows")
    figure, [axes] = style.panels(1, 1, (6.0, 3.7))
    for (study, metric), (label, look) in LINES.items():
        points = table[(table.study == study) & (table.metric == metric)].sort_values("dim")
        axes.plot(points.dim, points.percent, label=label if len(points) else None, **look)
        filled = points[points.dim.isin(trained)]
        axes.plot(filled.dim, filled.percent, **look | {"ls": "none", "markerfacecolor": look["color"]})
    style.dim_axis(axes, table.dim)
    axes.set_ylabel("accuracy (%)")
    heading = f"{style.heading(table)}, {table.run[0]}; filled: trained sizes"
    return style.finish(figure, heading, [label for label, _ in LINES.values()])


@rc_context(style.BOXED)
def confusions(
    counts: np.ndarray,
    dims: Sequence[int],
    shown: Sequence[int],
    names: Sequence[str],
    title: str,
    groups: np.ndarray | None = None,
) -> Figure:
    """Draw numbers of images by class and predicted class, ``(G, C, C)``, at those of the G sizes that are ``shown``.

    Of more than 20 classes those of the most frequent confusions at the smallest size shown are drawn. Classes of one
    of the ``groups`` ``(C,)`` stand together.
    """
    panels = counts[[list(dims).index(dim) for dim in shown]]
    pairs = np.triu(panels[0] + panels[0].T, 1)  # a pair of classes, whichever is taken for the other
    often = np.stack(np.unravel_index(np.argsort(-pairs, axis=None, kind="stable")[: MAX_NAMED**2], pairs.shape), 1)
    chosen = np.fromiter(dict.fromkeys(often.ravel().tolist()), int)[:MAX_NAMED]
    if len(names) <= MAX_NAMED:
        chosen = np.arange(len(names))
    chosen = chosen[np.lexsort((chosen, np.zeros(len(chosen)) if groups is None else groups[chosen]))]
    figure, all_axes = style.panels(len(shown), len(shown), (3.4, 3.9), sharey=True)
    norm = LogNorm(1, max(2, int(panels.max())))
    number_size = min(7, 280 / len(chosen) / len(str(panels.max())))
    for axes, dim, panel in zip(all_axes, shown, panels, strict=True):
        part = panel[np.ix_(chosen, chosen)]
        axes.imshow(np.where(part > 0, part, np.nan), cmap="Blues", norm=norm, aspect="auto")
        for row, column in np.argwhere(part):
            color = "white" if norm(part[row, column]) > 0.6 else "black"
            axes.text(column, row, str(part[row, column]), ha="center", va="center", fontsize=number_size, color=color)
        wrong, total = int(panel.sum() - np.trace(panel)), int(panel.sum())
        axes.set(title=f"{dim} dims: {wrong:,} of {total:,} wrong", xlabel="predicted class")
        labels = [names[c] for c in chosen]
        axes.set_xticks(range(len(chosen)), labels, rotation=0 if max(map(len, labels)) < 3 else 90, fontsize=8)
        axes.set_yticks(range(len(chosen)), labels, fontsize=8)
        axes.tick_params(length=0)
    all_axes[0].set_ylabel("class")
    if len(chosen) < len(names):
        title += f"; the {len(chosen)} of {len(names)} classes of the most frequent confusions at {shown[0]} dims"
    return style.finish(figure, title, [])


@rc_context(style.RC)
def sizes_each_class_needs(counts: np.ndarray, dims: Sequence[int], names: Sequence[str], title: str) -> Figure:
    """Draw the size that each class needs, largest first; of more than 20 classes, the 10 at each end.

    Of equal ones, those that gain most images from the smallest to the largest size come first. ``counts``
    ``(G, C, C)`` are numbers of images by class and predicted class.
    """
    needed, images = sizes_needed(counts, dims), counts[0].sum(axis=1)
    gains = np.diagonal(counts[-1]) - np.diagonal(counts[0])
    order = np.lexsort((-gains, -needed))[: (needed > 0).sum()]
    if (number := len(order)) > MAX_NAMED:
        order = np.concatenate([order[: MAX_NAMED // 2], order[-MAX_NAMED // 2 :]])
        title += f"; of {number} classes the {MAX_NAMED // 2} that need most and the {MAX_NAMED // 2} that need least"
    figure, [axes] = style.panels(1, 1, (6.0, 0.24 * len(order) + 1.4))
    axes.barh([names[c] for c in order], np.searchsorted(dims, needed[order]) + 1, color=style.BLUE, height=0.7)
    axes.invert_yaxis()
    axes.set_xticks(range(1, len(dims) + 1), list(map(str, dims)))
    axes.set(xlabel="size from which on a class is as accurate as at full width (dims)", ylabel="class")
    axes.grid(False, axis="y")
    few = int(images[images > 0].min())
    return style.finish(figure, f"{title}; an image is up to {100 / few:.1f} points of its class", [])
