"""Few-shot classification by the nearest class mean at every prefix (appendix G, table 15)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mrl.errors import UserError
from mrl.nesting import unit_prefix
from mrl.progress import progress
from mrl.results import Row, Source
from mrl.studies.cascade import spread
from mrl.studies.finite import refuse_array_not_finite

STUDY = "few_shot"
SHOTS = (1, 3, 5, 7, 9)
NUM_DRAWS = 10


def few_shot(
    vectors: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    source: Source,
    method: str,
    *,
    shots: Sequence[int] = SHOTS,
    num_draws: int = NUM_DRAWS,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows "top_1_<n>_shot" and "top_1_<n>_shot_std": mean and sample standard deviation of accuracy over the draws.

    For each draw, n images of each class are its supports and all others are classified, to the class whose mean of
    unit prefixes has the highest cosine; among equals the lower class. The paper says neither how many draws it
    took nor whether it normalised.

    Args:
        vectors: Embeddings ``(N, D)``, raw, of labelled images that the model was not trained on.
        labels: ``(N,)`` int64.
        dims: Prefix sizes.
        source: What the rows are of.
        method: The rows' method.
        shots: Supports per class.
        num_draws: Random choices of the supports, the same for every model.
        device: Where to compute.

    Raises:
        UserError: There is one class only, a class has no images left beside its supports, or a vector
            holds NaN or infinity; the message names its row.
    """
    classes, index = _check(vectors, labels, shots, num_draws)
    accuracies: dict[tuple[int, int], list[float]] = {}
    total = len(dims) * len(shots) * num_draws
    with progress(total=total, desc=f"{source.run}: few-shot", unit="draw") as bar:
        for dim in dims:
            z = unit_prefix(torch.from_numpy(np.array(vectors[:, :dim], dtype=np.float32)).to(device), dim)
            for n in shots:
                for supports, queries in support_draws(index, n, num_draws):
                    means = _class_means(z, supports, len(classes), n)
                    # Supports are scored too: leaving them out would copy nearly all of the embeddings.
                    chosen = (z @ means.T).argmax(dim=1).cpu().numpy()
                    accuracies.setdefault((n, dim), []).append(float((chosen == index)[queries].mean()))
                    bar.update()
    rows = []
    for (n, dim), found in accuracies.items():
        num_queries = len(vectors) - n * len(classes)
        for suffix, value in (("", statistics.mean(found)), ("_std", spread(found))):
            rows.append(source.row(STUDY, method, f"top_1_{n}_shot{suffix}", value, num_queries, dim=dim))
    return rows


def support_draws(labels: np.ndarray, shots: int, num_draws: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of the supports, ``shots`` of each class, and of all other images, for each draw.

    Draw i orders the images the same way for every ``shots``: its 1 support is among its 3.
    """
    for draw in range(num_draws):
        order = np.random.default_rng(draw).permutation(len(labels))
        by_class = order[np.argsort(labels[order], kind="stable")]
        sizes = np.bincount(labels)
        place = np.arange(len(labels)) - np.repeat(sizes.cumsum() - sizes, sizes)
        yield by_class[place < shots], by_class[place >= shots]


def _class_means(z: Tensor, supports: np.ndarray, num_classes: int, shots: int) -> Tensor:
    """Unit vectors ``(C, dim)`` along the mean of each class's supports, which come sorted by class."""
    chosen = z[torch.from_numpy(supports).to(z.device)]
    return unit_prefix(chosen.view(num_classes, shots, -1).mean(dim=1), z.shape[1])


def _check(
    vectors: np.ndarray, labels: np.ndarray, shots: Sequence[int], num_draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """The classes that occur and the position ``(N,)`` of each label among them."""
    if len(vectors) != len(labels) or not shots or min(shots) < 1 or num_draws < 1:
        raise UserError(
            f"few-shot was given {len(vectors)} embeddings, {len(labels)} labels, {list(shots)} shots and {num_draws} "
            "draws; allowed: a label for each embedding, and 1 or more of the others"
        )
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise UserError(f"few-shot classification needs two or more classes; the images have {len(classes)}")
    if counts.min() <= max(shots):
        raise UserError(
            f"class {classes[counts.argmin()]} has {counts.min()} images, so {max(shots)} supports leave none to "
            f"classify; allowed: up to {counts.min() - 1} shots"
        )
    refuse_array_not_finite(vectors)
    return classes, index
