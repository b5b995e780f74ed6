"""Retrieval metrics: top-k, mAP@k, precision@k, recall@k and the cost in multiply-adds (paper, section 4.3).

``hit`` is the ``(Q, K)`` bool array of `hits`, ``relevant`` is R ``(Q,)`` of `num_relevant`, k is 1 to K, and all
values are means over queries.
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


def top_k_hit(hit: np.ndarray, k: int) -> float:
    """Return the share of queries with a hit among the first ``k`` neighbors; k = 1 is 1-NN accuracy."""
    return float(hit[:, :k].any(axis=1).mean())


def precision(hit: np.ndarray, k: int) -> float:
    """Return precision@k: hits among the first ``k`` / k."""
    return float(hit[:, :k].mean())


def recall(hit: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Return recall@k: hits among the first ``k`` / R, 0 where R = 0. The authors' code divides by 1300 instead."""
    return float((hit[:, :k].sum(axis=1) / np.maximum(relevant, 1)).mean())


def mean_average_precision(hit: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Return mAP@k: AP@k is the sum of precision@i over the hits i <= k, **divided by min(k, R)**; 0 where R = 0.

    So a perfect list scores 1 also for a class of fewer than k images. If R >= k, as on ImageNet-1K, it is the paper's.

    >>> hit = np.array([[True, False, True]])
    >>> mean_average_precision(hit, np.array([2]), k=3)  # (1/1 + 2/3) / 2
    0.8333333333333333
    """
    first = hit[:, :k]
    precisions = np.cumsum(first, axis=1) / np.arange(1, k + 1)
    return float(((precisions * first).sum(axis=1) / np.clip(relevant, 1, k)).mean())


def retrieval_metrics(hit: np.ndarray, relevant: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Return all metrics by name: "top_1", and "top_k", "map@k", "precision@k" and "recall@k" for k of ``ks``."""
    found = {"top_1": top_k_hit(hit, 1)}
    for k in ks:
        found[f"top_{k}"] = top_k_hit(hit, k)
        found[f"map@{k}"] = mean_average_precision(hit, relevant, k)
        found[f"precision@{k}"] = precision(hit, k)
        found[f"recall@{k}"] = recall(hit, relevant, k)
    return found


def mflops_per_query(num_rows: int, shortlist_dim: int, stages: Sequence[tuple[int, int]] = ()) -> float:
    """Return million multiply-adds per query: (shortlist_dim * N + sum of length * dim over the stages) / 1e6.

    A multiply-add counts once, and a reranking counts also if its size is that of the shortlist. This matches every row
    of the paper's tables 11 and 12. It is not time: a search at 8 dims takes far more than 1/256 of one at 2048.

    Args:
        num_rows: Database vectors, N.
        shortlist_dim: Prefix size of the search.
        stages: ``(dim, length)`` of each reranking.

    >>> mflops_per_query(500_000, 64, [(2048, 200)])
    32.4096
    """
    return (shortlist_dim * num_rows + sum(dim * length for dim, length in stages)) / 1e6
