"""Grids of images: neighbors of a query by size, and Grad-CAM heat by size."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2 import functional

from mrl.figures.geometry import confusions
from mrl.figures.style import GREEN, RED, finish
from mrl.retrieval.search import Neighbors, exact_search
from mrl.studies.classification import predict
from mrl.studies.geometry import shown_sizes, telling_queries
from mrl.studies.hierarchy import confusion_counts
from mrl.studies.retrieval import thin_indices

if TYPE_CHECKING:
    from mrl.studies.run import OpenedRun

MAX_PX = 224  # of a photograph in a figure
MAX_QUERIES = 500
NUM_NEIGHBORS = 8
MAX_INCHES, MAX_WIDTH = 1.7, 10.4  # of an image, of a figure
NO_MATH: Any = {"text.parse_math": False}  # see `mrl.figures.style.RC`


@rc_context(NO_MATH)
def neighbor_grid(
    query: Tensor, found: Mapping[int, Sequence[tuple[Tensor, str]]], name: str | None = None, title: str = ""
) -> Figure:
    """Draw the query and its neighbors ``{dim: [(image, caption), ...]}``, best first; a row per size.

    Images are ``(3, H, W)``, uint8 or 0 to 1. If captions are classes, and ``name`` that of the query, frames tell
    right neighbors from wrong ones. A size without neighbors is one at which the query's prefix is all zero.
    """
    figure, grid = _panels(len(found), 1 + max(1, *map(len, found.values())))
    _show(grid[0, 0], query, f"query: {name}" if name else "query")
    for line, (dim, neighbors) in zip(grid, found.items(), strict=True):
        line[0].set_ylabel(f"{dim} dims", fontsize=8)
        if not neighbors:
            line[1].text(0, 0.5, "all-zero prefix: no neighbors", fontsize=7, va="center")
        for axes, (image, caption) in zip(line[1:], neighbors, strict=False):
            _show(axes, image, caption, right=None if name is None else caption == name)
    return finish(figure, title, [])


def neighbors_of(
    run: OpenedRun, found: Mapping[int, Neighbors], query: int, images: np.ndarray, title: str = ""
) -> Figure:
    """Draw the training images that a search for the validation images ``images`` found for ``images[query]``."""
    classes = run.image_classes or run.classes

    def named(split: str, labels: np.ndarray, indices: np.ndarray) -> list[tuple[Tensor, str]]:
        pictures = torch.from_numpy(run.pictures(split, indices)).permute(0, 3, 1, 2)
        return [(picture, classes[label]) for picture, label in zip(pictures, labels[indices], strict=True)]

    [(picture, name)] = named("val", run.val.labels, images[[query]])
    z = run.val.vectors[images[query]]
    shown = {
        dim: named("train", run.train.labels, indices[query]) if z[:dim].any() else []
        for dim, (indices, _) in found.items()
    }
    return neighbor_grid(picture, shown, name, title)


@rc_context(NO_MATH)
def grad_cam_sheet(
    run: OpenedRun,
    images: np.ndarray,
    heat: np.ndarray,
    predicted: np.ndarray,
    dims: Sequence[int],
    names: Sequence[str],
    title: str = "",
) -> Figure:
    """Draw the validation ``images`` ``(B,)`` of a run under the heat of what predictions rest on; a row per image.

    ``heat`` is ``(G, B, H, W)``, 0 to 1; ``predicted`` are classes ``(G, B)`` int64 at G ``dims``, called ``names``.
    Frames tell right predictions from wrong ones, unless the images are of other classes than the model's.
    """
    pictures, labels = torch.from_numpy(run.pictures("val", images)).permute(0, 3, 1, 2), run.val.labels[images]
    figure, grid = _panels(len(pictures), 1 + len(dims))
    for i, (line, picture) in enumerate(zip(grid, pictures, strict=True)):
        _show(line[0], picture, f"image of {(run.image_classes or names)[labels[i]]}")
        for g, axes in enumerate(line[1:]):
            right = None if run.image_classes else bool(predicted[g, i] == labels[i])
            _show(axes, picture.mean(dim=0, keepdim=True), f"{dims[g]} dims: {names[predicted[g, i]]}", right)
            axes.imshow(heat[g, i], cmap="inferno", vmin=0, vmax=1, alpha=0.6)
    return finish(figure, title, [])


def draw_neighbors(run: OpenedRun, device: torch.device) -> Figure:
    """Draw neighbors among a run's own images."""
    labels, taken = np.asarray(run.val.labels), thin_indices(len(run.val.labels), MAX_QUERIES)
    k = min(NUM_NEIGHBORS, len(run.train.labels))
    found = exact_search(run.val.vectors[taken], run.train.vectors, k, shown_sizes(run.dims), device=device)
    query = telling_queries(found, labels[taken], run.train.labels, num_queries=1)[0]
    title = f"{run.source.title}: training images nearest to a validation image, of {len(taken):,} the one whose"
    return neighbors_of(run, found, query, taken, f"{title} neighbors improve most; dashed: wrong")


def draw_confusions(run: OpenedRun, device: torch.device) -> Figure:
    """Draw which classes a run confuses at its smallest and its largest dim; needs no images."""
    ends = sorted({run.dims[0], run.dims[-1]})
    ends_of = [run.dims.index(dim) for dim in ends]
    predicted = predict(run.val.vectors, run.classifiers, device=device).classes[ends_of]
    counts = confusion_counts(predicted, run.val.labels, len(run.classes))
    return confusions(counts, ends, ends, run.classes, run.source.title)


PICTURES = {"neighbors": draw_neighbors, "confusions": draw_confusions}


def _panels(lines: int, columns: int) -> tuple[Figure, np.ndarray]:
    side = min(MAX_INCHES, MAX_WIDTH / columns)
    figure = Figure(figsize=(side * columns + 0.4, 1.18 * side * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], facecolor="none")
        axes.spines[:].set_visible(False)
    return figure, grid


def _show(axes: Axes, image: Tensor, caption: str, right: bool | None = None) -> None:
    """Show an image ``(3 or 1, H, W)`` under its caption; right ones have a thin frame, wrong ones a dashed one."""
    scale = min(1.0, MAX_PX / max(image.shape[1:]))  # photographs in full size would make a figure of megabytes
    image = functional.resize(image, [max(1, round(scale * side)) for side in image.shape[1:]], antialias=True)
    axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    color = {None: "black", True: GREEN, False: RED}[right]
    axes.set_title(textwrap.fill(caption.replace("_", " "), 18), fontsize=7, pad=2, color=color)
    if right is not None:
        look: dict[str, Any] = {"linewidth": 1.2} if right else {"linewidth": 2, "linestyle": "--"}
        axes.spines[:].set(visible=True, edgecolor=color, **look)
