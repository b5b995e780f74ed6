"""Cosine similarity of positive and of random pairs at every prefix size (paper, appendix E, table 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mrl.errors import UserError
from mrl.nesting import unit_prefix
from mrl.results import Row, Source
from mrl.studies.retrieval import check_labels

STUDY = "similarity"
BATCH_PAIRS = 4096


def similarity(
    vectors: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    source: Source,
    method: str,
    *,
    num_pairs: int = 10_000,
    seed: int = 0,
) -> list[Row]:
    """Rows of the mean cosine of pairs, -1 to 1, at each size: cosine_positive and cosine_random.

    A positive pair is two different images of one class, a random pair two different images of any.
    (The paper's positive pairs are an image and its caption.) The same pairs are taken at every size;
    ``n`` is their number. Where no class has two images there are no positive pairs and no such rows.

    Args:
        vectors: Embeddings ``(N, D)``, raw.
        labels: ``(N,)`` whole numbers.
        dims: Prefix sizes, each 1 to D.
        source: What the rows are of.
        method: The rows' method.
        num_pairs: How many pairs of each kind are drawn, with replacement.
        seed: Of the draw.

    Raises:
        UserError: The labels do not fit the embeddings, there are fewer than two images, a size is
            larger than the width, or an image of a pair has an embedding with NaN or infinity.
    """
    check_labels(vectors, labels, "images")
    if len(vectors) < 2:
        raise UserError(f"{source.run}: a pair needs two images, but there is {len(vectors)}")
    rng = np.random.default_rng(seed)
    drawn = {
        "cosine_positive": positive_pairs(labels, num_pairs, rng),
        "cosine_random": positive_pairs(np.zeros_like(labels), num_pairs, rng),
    }
    return [
        source.row(STUDY, method, metric, value, len(pairs), dim=dim)
        for metric, pairs in drawn.items()
        if len(pairs)
        for dim, value in _mean_cosines(vectors, pairs, dims).items()
    ]


def positive_pairs(labels: np.ndarray, num_pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs ``(num_pairs, 2)`` of different rows with one label, drawn with replacement; ``(0, 2)`` if there are none.

    The first of a pair is any row that shares its label, each as likely; the second any other of its class.
    """
    order = np.argsort(labels, kind="stable")
    _, class_starts, class_sizes = np.unique(labels[order], return_index=True, return_counts=True)
    starts, sizes = np.repeat(class_starts, class_sizes), np.repeat(class_sizes, class_sizes)
    shared = np.flatnonzero(sizes > 1)
    if not len(shared):
        return np.empty((0, 2), dtype=np.int64)
    first = rng.choice(shared, num_pairs)
    start, size = starts[first], sizes[first]
    second = start + (first - start + rng.integers(1, size)) % size
    return np.stack([order[first], order[second]], axis=1)


def _mean_cosines(vectors: np.ndarray, pairs: np.ndarray, dims: Sequence[int]) -> dict[int, float]:
    sums = dict.fromkeys(dims, 0.0)
    for start in range(0, len(pairs), BATCH_PAIRS):
        some = pairs[start : start + BATCH_PAIRS]
        left, right = (torch.from_numpy(np.array(vectors[rows], dtype=np.float32)) for rows in some.T)
        for side, rows in zip((left, right), some.T, strict=True):
            broken = (~side.isfinite().all(dim=1)).nonzero()[:, 0]
            if len(broken):
                raise UserError(f"row {rows[broken[0]]} of the embeddings holds NaN or infinity, so it has no cosine")
        for dim in sums:
            cosines = (unit_prefix(left, dim).double() * unit_prefix(right, dim).double()).sum(dim=1)
            # Rounding alone can carry a cosine past 1, and a sum past the number of pairs.
            sums[dim] += cosines.clamp(-1, 1).sum().item()
    return {dim: min(1.0, max(-1.0, total / len(pairs))) for dim, total in sums.items()}
