"""Re-ranking a shortlist at a larger prefix size, once or in a funnel (paper, section 4.3.1, tables 11 to 14)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mrl.errors import UserError
from mrl.progress import progress as progress_bar
from mrl.retrieval.search import Neighbors, Vectors, descending, exact_search, inverse_lengths, pack, unpack

# Database vectors looked at together: few enough to stay in the processor's cache until every query that has one of
# them on its list is through with it. A shortlist of 200 at 2048 dims is 1.6 MB, which read from memory takes longer
# than the arithmetic.
_BLOCK_BYTES = 2**23
_MAX_BYTES = 2**29  # of queries and lists at a time
_PAIR_BYTES = 100  # about what a place on a list takes while it is ordered


def rerank(
    queries: Vectors, database: Vectors, shortlist: np.ndarray, dim: int, *, progress: bool = False
) -> np.ndarray:
    """The shortlists ordered best first by cosine at ``dim``: a new ``(Q, S)`` int64 array.

    At ``dim`` the prefix is taken first and scaled to length 1 after, in float32; equal scores come
    by lower index. ``shortlist`` itself stays as it is.

    Args:
        queries: ``(Q, D)``, raw (not normalized), an array or a tensor; computed with on the CPU.
        database: ``(N, D)``, likewise; may be a memory-mapped file larger than the memory.
        shortlist: ``(Q, S)`` rows of the database in any order.
        dim: Prefix size, 1 to D.
        progress: Show a progress bar on stderr if it takes more than a moment.

    Raises:
        UserError: The shapes do not fit each other, the shortlist holds something other than rows
            of the database, or a vector that is looked at holds NaN or infinity.
    """
    return _rerank(queries, database, shortlist, dim, progress)[0]


def funnel_search(
    queries: Vectors,
    database: Vectors,
    shortlist_dim: int,
    stages: Sequence[tuple[int, int]],
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Neighbors:
    """Neighbors ``(indices, scores)`` of the last stage, each ``(Q, length)``, best first.

    An exact search at ``shortlist_dim`` finds the first stage's ``length`` neighbors; then each
    stage keeps the best ``length`` of the list so far and orders them at its ``dim``. One stage
    ``[(2048, 200)]`` is the paper's adaptive retrieval, several are its funnel.

    Args:
        queries: ``(Q, D)``, raw (not normalized).
        database: ``(N, D)``, likewise.
        shortlist_dim: Prefix size of the first search.
        stages: ``(dim, length)`` of each stage; lengths may not grow.
        device: Where to search; stages are computed on the CPU.
        progress: Show progress bars on stderr.

    Raises:
        UserError: There are no stages, their lengths grow or do not fit the database, or as `rerank`.
    """
    check_stages(stages, len(database), "vectors of the database")
    shortlist, _ = exact_search(queries, database, stages[0][1], [shortlist_dim], device=device, progress=progress)[
        shortlist_dim
    ]
    return funnel(queries, database, shortlist, stages, progress=progress)


def funnel(
    queries: Vectors,
    database: Vectors,
    shortlist: np.ndarray,
    stages: Sequence[tuple[int, int]],
    *,
    progress: bool = False,
) -> Neighbors:
    """As `funnel_search`, from a ``shortlist`` ``(Q, S)``, best first, that some other search has found."""
    check_stages(stages, np.shape(shortlist)[-1], "neighbors of the shortlist")
    for dim, length in stages:
        shortlist, scores = _rerank(queries, database, shortlist[:, :length], dim, progress)
    return shortlist, scores


def check_stages(stages: Sequence[tuple[int, int]], most: int, of: str) -> None:
    """Nothing, if the lengths of a funnel do not grow and lie between 1 and ``most``."""
    lengths = [length for _, length in stages]
    if not lengths or lengths != sorted(lengths, reverse=True) or not 1 <= lengths[-1] <= lengths[0] <= most:
        raise UserError(
            f"funnel stages {list(stages)} must be one or more (dim, length) whose lengths "
            f"do not grow and lie between 1 and the {most} {of}"
        )


def _check(queries: Vectors, database: Vectors, shortlist: np.ndarray, dim: int) -> None:
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise UserError(
            f"queries {tuple(queries.shape)} and database {tuple(database.shape)} must be matrices of equal width"
        )
    if shortlist.ndim != 2 or len(shortlist) != len(queries) or shortlist.dtype.kind not in "iu":
        raise UserError(
            f"a shortlist {shortlist.shape} of {shortlist.dtype} was given for {len(queries)} queries; "
            f"allowed is an integer matrix with one list a query"
        )
    if shortlist.size and not 0 <= shortlist.min() <= shortlist.max() < len(database):
        wrong = shortlist.min() if shortlist.min() < 0 else shortlist.max()
        raise UserError(f"the shortlist holds {wrong}; rows of the database are 0 to {len(database) - 1}")
    if not 1 <= dim <= database.shape[1]:
        raise UserError(f"prefix size {dim} must be one of 1 to {database.shape[1]}")


def _rerank(queries: Vectors, database: Vectors, shortlist: np.ndarray, dim: int, progress: bool) -> Neighbors:
    shortlist = np.asarray(shortlist)
    _check(queries, database, shortlist, dim)
    num_queries, length = shortlist.shape
    indices = np.empty(shortlist.shape, dtype=np.int64)
    scores = np.empty(shortlist.shape, dtype=np.float32)
    step = max(1, _MAX_BYTES // (_PAIR_BYTES * length + 4 * dim))
    with progress_bar(show=progress, total=shortlist.size, desc=f"rerank at {dim}", unit="pair") as bar:
        for first in range(0, num_queries, step):
            rows = np.arange(first, min(first + step, num_queries))
            some = _gather(queries, rows, dim)
            [query_lengths] = inverse_lengths(some, [dim], rows, "queries")
            products = np.empty(len(rows) * length, dtype=np.float32)
            for pairs, values in _scaled_products(some, database, shortlist[rows]):
                products[pairs] = values
                bar.update(len(pairs))
            cosines = torch.from_numpy(products).view(len(rows), length).mul_(query_lengths[:, None])
            ordered, best = unpack(descending(pack(cosines, torch.from_numpy(shortlist[rows].astype(np.int64)))))
            indices[rows], scores[rows] = ordered.numpy(), best.numpy()
    return indices, scores


def _scaled_products(queries: Tensor, database: Vectors, shortlist: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Inner products with the database vectors on the lists, each vector scaled to length 1, some pairs at a time.

    Args:
        queries: ``(Q, dim)``.
        database: ``(N, D)``.
        shortlist: ``(Q, S)``.

    Yields:
        Places ``(P,)`` in the flattened shortlist, and the products ``(P,)``.
    """
    num_queries, dim = queries.shape
    used = np.zeros(len(database), dtype=bool)
    used[shortlist] = True
    unique = np.flatnonzero(used)
    place = np.empty(len(database), dtype=np.int64)
    place[unique] = np.arange(len(unique))
    places = place[shortlist.reshape(-1)]
    block_rows = max(1, _BLOCK_BYTES // (4 * dim))
    num_blocks = -(-len(unique) // block_rows)
    block_of_pair = (places // block_rows).astype(np.min_scalar_type(num_blocks))  # numpy sorts small integers faster
    by_block = np.argsort(block_of_pair, kind="stable")  # and, within a block, by query
    ends = np.cumsum(np.bincount(block_of_pair, minlength=num_blocks))
    for block in range(num_blocks):
        pairs = by_block[ends[block - 1] if block else 0 : ends[block]]
        rows = unique[block * block_rows : (block + 1) * block_rows]
        vectors = _gather(database, rows, dim)
        [lengths] = inverse_lengths(vectors, [dim], rows, "database")
        columns = torch.from_numpy(places[pairs] - block * block_rows)
        counts = torch.from_numpy(np.bincount(pairs // shortlist.shape[1], minlength=num_queries))
        yield pairs, _products(queries, vectors, counts, columns).mul_(lengths[columns])


def _gather(vectors: Vectors, rows: np.ndarray, dim: int) -> Tensor:
    """The first ``dim`` coordinates of ``rows``, as a float32 matrix on the CPU."""
    if isinstance(vectors, Tensor):
        chosen = vectors.detach()[:, :dim].index_select(0, torch.from_numpy(rows).to(vectors.device))
        return chosen.to("cpu", torch.float32)
    return torch.from_numpy(np.asarray(vectors[:, :dim][rows], dtype=np.float32))


def _products(queries: Tensor, vectors: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
    """Inner products ``(P,)``: of query i with the next ``counts[i]`` of the vectors in the rows ``columns`` ``(P,)``.

    The pairs are the entries of a sparse matrix: torch computes those of a dense product that such a
    matrix has, straight from the two factors. Gathering a query's vectors first takes several times longer.
    """
    starts = torch.nn.functional.pad(counts.cumsum(dim=0), (1, 0))
    # torch refuses more entries than the dense product has, which lists that name a vector twice can come to.
    missing = math.ceil(len(columns) / len(queries)) - len(vectors)
    if missing > 0:
        vectors = torch.nn.functional.pad(vectors, (0, 0, 0, missing))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # says that it is in beta
        pairs = torch.sparse_csr_tensor(
            starts,
            columns,
            torch.zeros(len(columns)),
            size=(len(queries), len(vectors)),
            check_invariants=False,  # which want ascending columns; the product does not need them
        )
        return torch.sparse.sampled_addmm(pairs, queries, vectors.T, beta=0.0).values()
