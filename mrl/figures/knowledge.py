"""What a prefix knows, drawn: accuracy of classes and of groups of them, confusions, and the dims a class needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mrl.figures.style import METHOD_STYLES, OTHER_STYLES, Style, add_legend, counts, dataset_of, dim_axis, title
from mrl.results import Row

KNOWLEDGE = "prefix_knowledge"
LINES: dict[tuple[str, str], tuple[str, Style]] = {
    (KNOWLEDGE, "superclass_top_1"): ("right group, 1-NN", {"color": "#009E73", "marker": "s", "linestyle": "-"}),
    (KNOWLEDGE, "shuffled_superclass_top_1"): (
        "right group, 1-NN, were groups random",
        {"color": "#009E73", "marker": "", "linestyle": ":"},
    ),
    (KNOWLEDGE, "top_1"): ("right class, 1-NN", {"color": "#0072B2", "marker": "o", "linestyle": "-"}),
    ("classification", "top_1"): (
        "right class, linear classifier",
        {"color": "#000000", "marker": "x", "linestyle": "--"},
    ),
}
MOST_CLASSES_NAMED = 30


def accuracy_of_groups_and_classes(rows: Sequence[Row], trained: Sequence[int]) -> Figure:
    """Accuracy of groups of classes and of classes against size; sizes that were not trained have hollow markers.

    The number of images in the title is that of the queries taken, which may be some of the validation images.

    Args:
        rows: Of one run, from `mrl.studies.hierarchy.knowledge` and `mrl.studies.classification`.
        trained: The sizes that were.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if (row.study, row.metric) in LINES]
    dataset = dataset_of(rows, "what a prefix knows")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, (label, style) in LINES.items():
        of_line = [row for row in rows if (row.study, row.metric) == key]
        points = sorted((row.dim, 100 * row.value) for row in of_line if row.dim is not None)
        if not points:
            continue
        axes.plot(
            *zip(*points, strict=True), label=label, linewidth=1.6, markersize=5, markerfacecolor="white", **style
        )
        filled = [point for point in points if point[0] in trained]
        if filled and style["marker"]:
            axes.plot(*zip(*filled, strict=True), style["marker"], color=style["color"], markersize=5)
    dim_axis(axes, sorted({row.dim for row in rows if row.dim is not None}))
    axes.set_ylabel("accuracy (%)")
    title(figure, f"{dataset}, {rows[0].run}: {counts(rows)} images; filled: trained sizes")
    add_legend(figure, [label for label, _ in LINES.values()], entry_inches=2.8)
    return figure


def confusions(counts_of: np.ndarray, dims: Sequence[int], shown: Sequence[int], classes: Sequence[str]) -> Figure:
    """Who is taken for whom, a panel per size in ``shown``: numbers of images, the right ones on the diagonal.

    Of more than 30 classes those with the most errors at the smallest size shown are drawn.

    Args:
        counts_of: ``(G, C, C)``: images of each class (rows) by predicted class (columns), of the queries taken.
        dims: G prefix sizes.
        shown: Those to draw.
        classes: C names.
    """
    panels = [counts_of[list(dims).index(dim)] for dim in shown]
    errors = panels[0].sum(axis=1) - np.diagonal(panels[0])
    chosen = np.sort(np.argsort(-errors, kind="stable")[:MOST_CLASSES_NAMED])
    names = [classes[c] for c in chosen]
    figure = Figure(figsize=(3.3 * len(shown) + 0.6, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    norm = LogNorm(1, max(2, max(int(panel.max()) for panel in panels)))
    for axes, dim, panel in zip(all_axes, shown, panels, strict=True):
        part = panel[np.ix_(chosen, chosen)]
        axes.imshow(np.where(part > 0, part, np.nan), cmap="Blues", norm=norm)
        if len(names) <= 12:
            _number_cells(axes, part, norm)
        wrong = int(panel.sum() - np.trace(panel))
        axes.set_title(f"{dim} dims: {wrong:,} of {int(panel.sum()):,} wrong", fontsize=10)
        axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 3 else 90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("predicted class")
        axes.tick_params(length=0)
        axes.spines[:].set_color("0.8")
    all_axes[0].set_ylabel("class")
    return figure


def sizes_each_class_needs(needed: np.ndarray, dims: Sequence[int], classes: Sequence[str]) -> Figure:
    """Which classes need more dims: a bar per class, the longest first; of more than 30, those that need most.

    Args:
        needed: ``(C,)`` of `mrl.studies.hierarchy.sizes_needed`.
        dims: All sizes, ascending.
        classes: C names.
    """
    order = np.argsort(-needed, kind="stable")[:MOST_CLASSES_NAMED]
    order = order[needed[order] > 0]
    figure = Figure(figsize=(6.4, 0.24 * len(order) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = [list(dims).index(dim) + 1 for dim in needed[order]]
    style = METHOD_STYLES["MRL"] if len(order) else OTHER_STYLES[0]
    axes.barh(range(len(order)), places, color=style["color"], height=0.7)
    axes.set_yticks(range(len(order)), [classes[c] for c in order], fontsize=9)
    axes.invert_yaxis()
    axes.set_xticks(range(1, len(dims) + 1), list(map(str, dims)))
    axes.set_xlabel("size from which on accuracy is within a point of that at full width (dims)")
    axes.set_ylabel("class")
    axes.grid(True, axis="x", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _number_cells(axes, part: np.ndarray, norm: LogNorm) -> None:  # type: ignore[no-untyped-def]
    for (row, column), count in np.ndenumerate(part):
        if count:
            color = "white" if norm(count) > 0.6 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
