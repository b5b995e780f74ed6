"""Grids of images: neighbors of a query by size, and Grad-CAM heat by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2 import functional

from mrl.figures.style import GREEN, RED
from mrl.retrieval.search import Neighbors

if TYPE_CHECKING:
    from mrl.studies.run import OpenedRun

MAX_PX = 224  # of a photograph in a figure


def neighbor_grid(query: Tensor, found: Mapping[int, Sequence[tuple[Tensor, str]]], name: str | None = None) -> Figure:
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
    return figure


def neighbors_of(run: OpenedRun, found: Mapping[int, Neighbors], query: int, images: np.ndarray) -> Figure:
    """Draw the training images that a search for the validation images ``images`` found for ``images[query]``."""

    def named(split: str, labels: np.ndarray, indices: np.ndarray) -> list[tuple[Tensor, str]]:
        pictures = torch.from_numpy(run.pictures(split, indices)).permute(0, 3, 1, 2)
        return [(picture, run.classes[label]) for picture, label in zip(pictures, labels[indices], strict=True)]

    [(picture, name)] = named("val", run.val.labels, images[[query]])
    z = run.val.vectors[images[query]]
    shown = {
        dim: named("train", run.train.labels, indices[query]) if z[:dim].any() else []
        for dim, (indices, _) in found.items()
    }
    return neighbor_grid(picture, shown, name)


def grad_cam_sheet(
    pictures: np.ndarray, heat: np.ndarray, labels: np.ndarray, predicted: np.ndarray, dims: Sequence[int], names: Any
) -> Figure:
    """Draw B images under the heat of what the predictions at G sizes rest on; a row per image.

    Args:
        pictures: ``(B, H, W, 3)``, 0 to 1.
        heat: ``(G, B, H, W)``, 0 to 1.
        labels: ``(B,)`` int64.
        predicted: Classes ``(G, B)`` int64.
        dims: G sizes.
        names: Of the classes.
    """
    figure, grid = _panels(len(pictures), 1 + len(dims))
    for i, (line, picture) in enumerate(zip(grid, torch.from_numpy(pictures).permute(0, 3, 1, 2), strict=True)):
        _show(line[0], picture, f"image of {names[labels[i]]}")
        for g, axes in enumerate(line[1:]):
            caption, right = f"{dims[g]} dims: {names[predicted[g, i]]}", bool(predicted[g, i] == labels[i])
            _show(axes, picture.mean(dim=0, keepdim=True), caption, right)
            axes.imshow(heat[g, i], cmap="inferno", vmin=0, vmax=1, alpha=0.6)
    return figure


def _panels(lines: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(1.15 * columns + 0.4, 1.35 * lines), layout="constrained")
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
    axes.set_title(caption, fontsize=7, pad=2, color=color)
    if right is not None:
        look: dict[str, Any] = {"linewidth": 1.2} if right else {"linewidth": 2, "linestyle": "--"}
        axes.spines[:].set(visible=True, edgecolor=color, **look)
