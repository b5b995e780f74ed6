"""Coarse to fine, seen: neighbors of the same queries, and where the classifier of each size looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mrl.errors import UserError
from mrl.retrieval.search import Neighbors
from mrl.studies.classification import predict
from mrl.studies.geometry import grad_cams
from mrl.studies.run import OpenedRun

RIGHT, WRONG = "#009E73", "#D55E00"


def neighbors_of(run: OpenedRun, found: Mapping[int, Neighbors], query: int, images: np.ndarray) -> Figure:
    """The training images nearest to validation image ``images[query]``, a row per size of ``found``.

    Args:
        run: Whose images are shown.
        found: ``{dim: (indices, scores)}`` of `mrl.exact_search`, of some validation images among the training images.
        query: Row of these.
        images: Rows ``(Q,)`` int64 of the validation images that were searched for.
    """
    rows = {dim: indices[query] for dim, (indices, _) in found.items()}
    shown = {
        dim: (run.pictures("train", of_dim), _names(run, run.train.labels[of_dim])) for dim, of_dim in rows.items()
    }
    image = images[[query]]
    [picture], [name] = run.pictures("val", image), _names(run, run.val.labels[image])
    return neighbors_by_dim(picture, name, shown)


def grad_cams_of(run: OpenedRun, images: np.ndarray, dims: Sequence[int]) -> Figure:
    """What the predictions of sizes ``dims`` rest on, in the validation images of rows ``images``.

    Raises:
        UserError: A size has no classifier; or as `mrl.studies.geometry.grad_cams`.
    """
    if unknown := sorted(set(dims) - set(run.dims)):
        raise UserError(f"sizes {unknown} have no classifier; those of {run.source.run} are {list(run.dims)}")
    classifiers = [run.classifiers[run.dims.index(dim)] for dim in dims]
    predicted = predict(run.val.vectors[images], classifiers).classes
    heat = grad_cams(run.model, run.images("val", images), classifiers, predicted)
    said = [_names(run, of_size) for of_size in predicted]
    return grad_cam_sheet(run.pictures("val", images), _names(run, run.val.labels[images]), heat, dims, said)


def neighbors_by_dim(query: np.ndarray, name: str, neighbors: Mapping[int, tuple[np.ndarray, Sequence[str]]]) -> Figure:
    """One query and a row of its nearest neighbors per size, best first.

    A neighbor of another class has a dashed frame and its name in another color.

    Args:
        query: ``(H, W, 3)``, 0 to 1.
        name: Its class.
        neighbors: ``{dim: (images (K, H, W, 3), their K classes)}``.
    """
    num_columns = 1 + max(len(names) for _, names in neighbors.values())
    figure = Figure(figsize=(0.82 * num_columns + 0.5, 0.98 * len(neighbors)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(neighbors), num_columns, squeeze=False)
    for axes in grid.flat:
        _bare(axes)
    for line, (dim, (images, names)) in zip(grid, neighbors.items(), strict=True):
        line[0].set_ylabel(f"{dim} dims", fontsize=8)
        for axes, image, of_image in zip(line[1:], images, names, strict=False):
            axes.imshow(image, interpolation="nearest")
            _frame(axes, of_image == name)
            axes.set_title(of_image, fontsize=7, pad=2, color=RIGHT if of_image == name else WRONG)
    for axes in grid[1:, 0]:
        axes.set_facecolor("none")
    grid[0, 0].imshow(query, interpolation="nearest")
    grid[0, 0].set_title(f"query: {name}", fontsize=7, pad=2)
    return figure


def grad_cam_sheet(
    images: np.ndarray, names: Sequence[str], heat: np.ndarray, dims: Sequence[int], said: Sequence[Sequence[str]]
) -> Figure:
    """A row per image, a column per size: the image under the heat of what that size's prediction rests on.

    Args:
        images: ``(B, H, W, 3)``, 0 to 1.
        names: Their B classes.
        heat: ``(G, B, H, W)``, 0 to 1.
        dims: G sizes.
        said: The predicted class of each size and image: G sequences of B names.
    """
    figure = Figure(figsize=(1.15 * (len(dims) + 1) + 0.3, 1.32 * len(images) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(images), len(dims) + 1, squeeze=False)
    for i, line in enumerate(grid):
        for axes in line:
            _bare(axes)
        line[0].imshow(images[i], interpolation="nearest")
        line[0].set_title(f"image of {names[i]}", fontsize=7, pad=2)
        gray = images[i].mean(axis=-1)
        for axes, dim, of_size, classes in zip(line[1:], dims, heat, said, strict=True):
            axes.imshow(gray, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.imshow(of_size[i], cmap="inferno", vmin=0, vmax=1, alpha=0.6)
            right = classes[i] == names[i]
            axes.set_title(f"{dim} dims: {classes[i]}", fontsize=7, pad=2, color=RIGHT if right else WRONG)
            _frame(axes, right)
    return figure


def _names(run: OpenedRun, labels: np.ndarray) -> list[str]:
    return [run.classes[label] for label in labels]


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _frame(axes: Axes, right: bool) -> None:
    look: dict[str, Any] = (
        {"edgecolor": RIGHT, "linewidth": 1.2} if right else {"edgecolor": WRONG, "linewidth": 2, "linestyle": "--"}
    )
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, clip_on=False, **look))
