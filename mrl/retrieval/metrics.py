"""How good lists of neighbors are: top-k, mAP@k, precision@k and recall@k (paper, section 4.3, tables 8 to 14).

What a search costs in arithmetic (paper, tables 8 and 10 to 14, figure 8).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mrl.errors import UserError


def hits(neighbors: np.ndarray, query_labels: np.ndarray, database_labels: np.ndarray) -> np.ndarray:
    """Whether each neighbor has its query's label: ``(Q, K)`` bool.

    Args:
        neighbors: Database rows ``(Q, K)`` int64, best first.
        query_labels: ``(Q,)`` integers of any size.
        database_labels: ``(N,)`` integers of any size.

    Raises:
        UserError: The labels are not integers, or there is not one query label per list.
    """
    query_labels, database_labels = _integers("query", query_labels), _integers("database", database_labels)
    if neighbors.ndim != 2 or query_labels.shape != (len(neighbors),):
        raise UserError(
            f"{query_labels.shape} query labels for neighbors of shape {neighbors.shape}; allowed is one label a list"
        )
    return database_labels[neighbors] == query_labels[:, None]


def num_relevant(query_labels: np.ndarray, database_labels: np.ndarray) -> np.ndarray:
    """How many database images have each query's label: R, ``(Q,)`` int64.

    Raises:
        UserError: The labels are not integers.
    """
    query_labels, database_labels = _integers("query", query_labels), _integers("database", database_labels)
    classes, counts = np.unique(database_labels, return_counts=True)
    if not len(classes):
        return np.zeros(query_labels.shape, dtype=np.int64)
    place = np.minimum(np.searchsorted(classes, query_labels), len(classes) - 1)
    return np.where(classes[place] == query_labels, counts[place], 0)


def top_k_hit(hit: np.ndarray, k: int) -> float:
    """Share of queries with a hit among the first ``k`` neighbors; k = 1 is top-1, which is 1-NN accuracy.

    Args:
        hit: ``(Q, K)`` bool of `hits`.
        k: 1 to K.

    Raises:
        UserError: ``k`` is out of range, or there are no queries.
    """
    return float(_first(hit, k).any(axis=1).mean())


def precision(hit: np.ndarray, k: int) -> float:
    """Precision@k: hits among the first ``k`` neighbors / k, mean over queries. Arguments as `top_k_hit`."""
    return float(_first(hit, k).mean())


def recall(hit: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Recall@k: hits among the first ``k`` neighbors / R, mean over queries.

    R is each query's own number of relevant database images (the authors' code divides by a constant
    1300). A query with none counts as 0.

    Args:
        hit: ``(Q, K)`` bool of `hits`.
        relevant: R ``(Q,)`` of `num_relevant`.
        k: 1 to K.

    Raises:
        UserError: ``k`` is out of range, or there are no queries.
    """
    return float((_first(hit, k).sum(axis=1) / np.maximum(relevant, 1)).mean())


def mean_average_precision(hit: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """mAP@k: the mean over queries of AP@k = sum of precision@i over the hits i <= k, **/ min(k, R)**.

    The denominator is the most hits that k neighbors could have, so that a perfect list scores 1
    also for a class of fewer than k images. Wherever R >= k, as on ImageNet-1K, it is the paper's k.
    A query without relevant images counts as 0. Arguments and errors as `recall`.
    """
    first = _first(hit, k)
    precisions = np.cumsum(first, axis=1) / np.arange(1, k + 1)
    return float(((precisions * first).sum(axis=1) / np.clip(relevant, 1, k)).mean())


def retrieval_metrics(hit: np.ndarray, relevant: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """All metrics by name, each in [0, 1]: "top_1", and "top_k", "map@k", "precision@k", "recall@k" for k of ``ks``.

    Args:
        hit: ``(Q, K)`` bool of `hits`.
        relevant: R ``(Q,)`` of `num_relevant`.
        ks: Each 1 to K.

    Raises:
        UserError: A ``k`` is out of range, or there are no queries.
    """
    found = {"top_1": top_k_hit(hit, 1)}
    for k in ks:
        found[f"top_{k}"] = top_k_hit(hit, k)
        found[f"map@{k}"] = mean_average_precision(hit, relevant, k)
        found[f"precision@{k}"] = precision(hit, k)
        found[f"recall@{k}"] = recall(hit, relevant, k)
    return found


def _integers(name: str, labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise UserError(f"{name} labels are {labels.dtype}; allowed are integers, which stay distinct at any size")
    return labels.astype(np.int64, copy=False)


def _first(hit: np.ndarray, k: int) -> np.ndarray:
    if not len(hit):
        raise UserError("there are no queries, so there is no mean over them")
    if not 1 <= k <= hit.shape[1]:
        raise UserError(f"k = {k} of lists of {hit.shape[1]} neighbors; allowed are 1 to {hit.shape[1]}")
    return hit[:, :k]


def mflops_per_query(num_rows: int, shortlist_dim: int, stages: Sequence[tuple[int, int]] = ()) -> float:
    """Million multiply-adds per query: ``(shortlist_dim * N + sum of length * dim over the stages) / 1e6``.

    The paper counts a multiply and an add as one operation, and counts the re-ranking also where its
    size is that of the shortlist; this matches its tables 11 and 12 in every row. It is arithmetic,
    not time: a search at 8 dims takes far more than 1/256 of the time of one at 2048.

    Args:
        num_rows: Vectors in the database, N.
        shortlist_dim: Prefix size of the first, exhaustive search.
        stages: ``(dim, length)`` of each re-ranking; none for a plain search.
    """
    return (shortlist_dim * num_rows + sum(dim * length for dim, length in stages)) / 1e6
