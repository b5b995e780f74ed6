"""Reranking of a shortlist at a larger prefix size, once or in a funnel (paper, section 4.3.1, tables 11 to 14)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mrl.errors import UserError
from mrl.retrieval.search import (
    Neighbors,
    Vectors,
    check_vectors,
    descending,
    exact_search,
    inverse_norms,
    pack,
    unpack,
)

# Few enough database vectors to stay in the processor's cache while all queries that need them are served. Reading each
# shortlist from memory (1.6 MB for 200 vectors of 2048 dims) takes longer than the arithmetic.
_BLOCK_BYTES = 2**23
_MAX_BYTES = 2**29  # of queries and their shortlists in memory at a time
_PAIR_BYTES = 100  # approximate memory for one entry of a shortlist


def rerank(queries: Vectors, database: Vectors, shortlist: np.ndarray, dim: int) -> np.ndarray:
    """Return the shortlists ordered by cosine at ``dim``, best first, as a new ``(Q, S)`` int64 array.

    Equal scores come by lower index. ``shortlist`` is not modified.

    Args:
        queries, database: ``(Q, D)`` and ``(N, D)``, raw (not normalized); computed on the CPU. The database may be a
            memory-mapped file larger than the memory.
        shortlist: ``(Q, S)`` database indices in any order.
        dim: Prefix size, 1 to D.

    Raises:
        UserError: The arguments do not fit each other, or a vector in use holds NaN or infinity.
    """
    return _rerank(queries, database, shortlist, dim)[0]


def funnel_search(
    queries: Vectors,
    database: Vectors,
    shortlist_dim: int,
    stages: Sequence[tuple[int, int]],
    *,
    device: torch.device | str = "cpu",
) -> Neighbors:
    """Return the neighbors ``(indices, scores)`` of the last stage, each ``(Q, length)``, best first.

    An exact search at ``shortlist_dim`` finds the first stage's ``length`` neighbors; then each stage keeps the best
    ``length`` of them and reranks these at its ``dim``. One stage ``[(2048, 200)]`` is the paper's adaptive retrieval,
    several stages are its funnel.

    Args:
        queries, database: ``(Q, D)`` and ``(N, D)``, raw (not normalized).
        shortlist_dim: Prefix size of the search.
        stages: ``(dim, length)`` of each reranking; lengths may not grow.
        device: Where to search; reranking runs on the CPU.

    Raises:
        UserError: The stages do not fit, or as `exact_search` and `rerank`.
    """
    check_stages(stages, len(database), "vectors of the database")
    found = exact_search(queries, database, stages[0][1], [shortlist_dim], device=device)
    return funnel(queries, database, found[shortlist_dim][0], stages)


def funnel(queries: Vectors, database: Vectors, shortlist: np.ndarray, stages: Sequence[tuple[int, int]]) -> Neighbors:
    """Do as `funnel_search` from a ``shortlist`` ``(Q, S)``, best first, of any other search."""
    check_stages(stages, np.shape(shortlist)[-1], "neighbors of the shortlist")
    for dim, length in stages:
        shortlist, scores = _rerank(queries, database, shortlist[:, :length], dim)
    return shortlist, scores


def check_stages(stages: Sequence[tuple[int, int]], most: int, of: str) -> None:
    """Check that the lengths of a funnel do not grow and lie between 1 and ``most``."""
    lengths = [length for _, length in stages]
    if not lengths or lengths != sorted(lengths, reverse=True) or not 1 <= lengths[-1] <= lengths[0] <= most:
        raise UserError(
            f"funnel stages {list(stages)} must be one or more (dim, length) whose lengths "
            f"do not grow and lie between 1 and the {most} {of}"
        )


def _rerank(queries: Vectors, database: Vectors, shortlist: np.ndarray, dim: int) -> Neighbors:
    shortlist = np.asarray(shortlist)
    check_vectors(queries, database, [dim])
    if shortlist.ndim != 2 or len(shortlist) != len(queries) or shortlist.dtype.kind not in "iu":
        raise UserError(
            f"the shortlist is {shortlist.shape} of {shortlist.dtype}; allowed: integers, one list for each "
            f"of the {len(queries)} queries"
        )
    if shortlist.size and not 0 <= shortlist.min() <= shortlist.max() < len(database):
        wrong = shortlist.min() if shortlist.min() < 0 else shortlist.max()
        raise UserError(f"the shortlist holds index {wrong}; allowed: 0 to {len(database) - 1}")
    indices, scores = np.empty(shortlist.shape, np.int64), np.empty(shortlist.shape, np.float32)
    step = max(1, _MAX_BYTES // (_PAIR_BYTES * shortlist.shape[1] + 4 * dim))
    for first in range(0, len(shortlist), step):
        lists = shortlist[first : first + step].astype(np.int64)
        some = _gather(queries, np.arange(first, first + len(lists)), dim)
        cosines = np.empty(lists.size, dtype=np.float32)
        for pairs, values in _scaled_products(some, database, lists):
            cosines[pairs] = values
        scaled = torch.from_numpy(cosines).view(lists.shape) * inverse_norms(some, [dim], "query", first)[0][:, None]
        ordered, best = unpack(descending(pack(scaled, torch.from_numpy(lists))))
        indices[first : first + step], scores[first : first + step] = ordered, best
    return indices, scores


def _scaled_products(queries: Tensor, database: Vectors, shortlist: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield positions ``(P,)`` in the flattened shortlist, and inner products with these vectors over their norms."""
    dim = queries.shape[1]
    used = np.zeros(len(database), dtype=bool)
    used[shortlist] = True
    unique = np.flatnonzero(used)
    positions = (used.cumsum() - 1)[shortlist.reshape(-1)]
    block_rows = max(1, _BLOCK_BYTES // (4 * dim))
    num_blocks = math.ceil(len(unique) / block_rows)
    block_of_pair = (positions // block_rows).astype(np.min_scalar_type(num_blocks))  # small integers sort faster
    by_block = np.argsort(block_of_pair, kind="stable")  # within a block by query
    ends = np.bincount(block_of_pair, minlength=num_blocks).cumsum()
    for block, pairs in enumerate(np.split(by_block, ends[:-1])[:num_blocks]):
        indices = unique[block * block_rows : (block + 1) * block_rows]
        vectors = _gather(database, indices, dim)
        [scales] = inverse_norms(vectors, [dim], "database", torch.from_numpy(indices))
        columns = torch.from_numpy(positions[pairs] - block * block_rows)
        counts = torch.from_numpy(np.bincount(pairs // shortlist.shape[1], minlength=len(queries)))
        yield pairs, _products(queries, vectors, counts, columns).mul_(scales[columns])


def _gather(vectors: Vectors, indices: np.ndarray, dim: int) -> Tensor:
    """Return the first ``dim`` coordinates of ``indices``, float32 on the CPU."""
    return torch.as_tensor(vectors[:, :dim][indices]).detach().to("cpu", torch.float32)


def _products(queries: Tensor, vectors: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
    """Return the inner products ``(P,)`` of query i with the next ``counts[i]`` of ``vectors[columns]``.

    The pairs are entries of a sparse matrix, of which torch computes only the given entries of ``queries @ vectors.T``.
    Gathering the vectors of each query instead takes several times longer.
    """
    # torch refuses more entries than the dense product has, which happens if lists name a vector twice.
    missing = math.ceil(len(columns) / len(queries)) - len(vectors)
    if missing > 0:
        vectors = torch.nn.functional.pad(vectors, (0, 0, 0, missing))
    starts = torch.nn.functional.pad(counts.cumsum(dim=0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # it is in beta
        entries = torch.zeros(len(columns))
        size = (len(queries), len(vectors))
        pairs = torch.sparse_csr_tensor(starts, columns, entries, size, check_invariants=False)  # columns are unsorted
        return torch.sparse.sampled_addmm(pairs, queries, vectors.T, beta=0.0).values()
