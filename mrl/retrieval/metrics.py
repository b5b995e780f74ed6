"""Retrieval metrics: top-k, mAP@k, precision@k, recall@k and the cost in multiply-adds (paper, section 4.3).

``hit`` is the ``(Q, K)`` bool array of `hits`, ``relevant`` is R ``(Q,)`` of `num_relevant`, and k is 1 to K.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hits(neighbors: np.ndarray, query_labels: np.ndarray, database_labels: np.ndarray) -> np.ndarray:
    """Return whether each neighbor ``(Q, K)``, best first, has its query's label: ``(Q, K)`` bool."""
    return database_labels[neighbors] == query_labels[:, None]


def num_relevant(query_labels: np.ndarray, database_labels: np.ndarray) -> np.ndarray:
    """Return how many database images have each query's label: R, ``(Q,)`` int64.

    >>> num_relevant(np.array([7, 5, 9]), np.array([5, 7, 7]))
    array([2, 1, 0])
    """
    ordered = np.sort(database_labels)
    return np.searchsorted(ordered, query_labels, "right") - np.searchsorted(ordered, query_labels, "left")


def retrieval_metrics(hit: np.ndarray, relevant: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Return means over queries of "top_1" and, for k of ``ks``, "top_k", "map@k", "precision@k" and "recall@k".

    - top_k: whether one of the first k neighbors is a hit; top_1 is 1-NN accuracy.
    - map@k: the sum of precision@i over the hits i <= k, **divided by min(k, R)**. So a perfect list scores 1 also for
      a class of fewer than k images; if R >= k, as on ImageNet-1K, it is the paper's. 0 where R = 0.
    - precision@k: hits among the first k / k.
    - recall@k: hits among the first k / R, 0 where R = 0. The authors' code divides by 1300 instead.

    >>> found = retrieval_metrics(np.array([[True, False, True]]), np.array([2]), [3])
    >>> found["map@3"]  # (1/1 + 2/3) / 2
    0.8333333333333333
    """
    found = {"top_1": float(hit[:, 0].mean())}
    precisions = hit.cumsum(axis=1) / np.arange(1, hit.shape[1] + 1)
    for k in ks:
        first = hit[:, :k]
        found[f"top_{k}"] = float(first.any(axis=1).mean())
        found[f"map@{k}"] = float(((precisions * hit)[:, :k].sum(axis=1) / np.clip(relevant, 1, k)).mean())
        found[f"precision@{k}"] = float(first.mean())
        found[f"recall@{k}"] = float((first.sum(axis=1) / np.maximum(relevant, 1)).mean())
    return found


def mflops_per_query(num_rows: int, shortlist_dim: int, stages: Sequence[tuple[int, int]] = ()) -> float:
    """Return million multiply-adds per query: (shortlist_dim * N + sum of length * dim over the stages) / 1e6.

    ``num_rows`` is N; ``stages`` are ``(dim, length)`` of each reranking. A multiply-add counts once, and a reranking
    counts also if its size is that of the shortlist. This matches every row of the paper's tables 11 and 12. It is not
    time: a search at 8 dims takes far more than 1/256 of one at 2048.

    >>> mflops_per_query(500_000, 64, [(2048, 200)])
    32.4096
    """
    return (shortlist_dim * num_rows + sum(dim * length for dim, length in stages)) / 1e6
