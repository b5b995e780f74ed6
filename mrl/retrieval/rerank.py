"""Reranking of shortlists, once (adaptive retrieval) or in stages (funnel); paper, section 4.3.1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mrl.nesting import unit_prefix
from mrl.retrieval.search import exact_search


def rerank(queries: np.ndarray, database: np.ndarray, shortlist: np.ndarray, dim: int) -> np.ndarray:
    """``shortlist`` ``(Q, S)`` in a new array, best first by cosine at ``dim``."""
    ordered = np.empty_like(shortlist)
    step = max(1, 2**22 // (shortlist.shape[1] * dim))
    for first in range(0, len(queries), step):
        rows = slice(first, first + step)
        found = unit_prefix(torch.from_numpy(np.array(database[:, :dim][shortlist[rows]], dtype=np.float32)), dim)
        asked = unit_prefix(torch.from_numpy(np.array(queries[rows, :dim], dtype=np.float32)), dim)
        scores = torch.einsum("qsd,qd->qs", found, asked)
        order = scores.sort(dim=1, descending=True, stable=True).indices.numpy()
        ordered[rows] = np.take_along_axis(shortlist[rows], order, axis=1)
    return ordered


def funnel_search(
    queries: np.ndarray, database: np.ndarray, shortlist_dim: int, stages: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, None]:
    """Neighbours after a search at ``shortlist_dim`` and, for each stage, ``length`` of them reordered at ``dim``."""
    indices = exact_search(queries, database, stages[0][1], [shortlist_dim])[shortlist_dim][0]
    for dim, length in stages:
        indices = rerank(queries, database, indices[:, :length], dim)
    return indices, None
