"""Neighbors of one image at several prefix sizes, seen."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2 import functional

MAX_PX = 224


def neighbor_grid(query: Tensor, rows: dict[int, list[tuple[Tensor, str]]]) -> Figure:
    """A row per size: the query, then its neighbors, best first, each under its caption.

    Args:
        query: ``(3, H, W)`` uint8.
        rows: ``{dim: [(image, caption), ...]}``, images likewise, of any sizes.
    """
    columns = 1 + max(map(len, rows.values()))
    figure = Figure(figsize=(1.25 * columns + 0.4, 1.45 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (dim, found) in zip(grid, rows.items(), strict=True):
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(f"{dim} dims", fontsize=9)
        _show(line[0], query, "query")
        line[0].spines[:].set_visible(True)
        for axes, (image, caption) in zip(line[1:], found, strict=False):
            _show(axes, image, caption)
    return figure


def _show(axes: Axes, image: Tensor, caption: str) -> None:
    if max(image.shape[1:]) > MAX_PX:  # a figure of full-size photographs would be one of megabytes
        scale = MAX_PX / max(image.shape[1:])
        image = functional.resize(image, [max(1, round(scale * side)) for side in image.shape[1:]], antialias=True)
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_title(caption, fontsize=8, pad=2)
