"""Retrieval metrics (paper, appendix E), each the mean over queries; hits are (Q, K) bool, nearest first."""

from __future__ import annotations

import numpy as np


def top_1(hits: np.ndarray) -> float:
    """The share of queries whose nearest neighbour is relevant."""
    return float(hits[:, 0].mean())


def precision_at_k(hits: np.ndarray, k: int) -> float:
    """The share of relevant rows among the first ``k``."""
    return float(hits[:, :k].mean())


def recall_at_k(hits: np.ndarray, num_relevant: np.ndarray, k: int) -> float:
    """The share of the ``num_relevant`` ``(Q,)`` rows found in the first ``k``; 0 for a query that has none."""
    return float((hits[:, :k].sum(axis=1) / np.maximum(num_relevant, 1)).mean())


def map_at_k(hits: np.ndarray, num_relevant: np.ndarray, k: int) -> float:
    """Mean of the precisions at the hits, summed and divided by min(k, R); 0 for a query without relevant rows."""
    hits = hits[:, :k]
    precisions = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    possible = np.clip(num_relevant, 1, k)
    return float(((precisions * hits).sum(axis=1) / possible).mean())
