"""Exact nearest neighbours by cosine similarity, at any set of prefix sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mrl.errors import UserError
from mrl.progress import progress as progress_bar
from mrl.retrieval.selection import MAX_ROWS, Best

Vectors = np.ndarray | Tensor
Neighbours = tuple[np.ndarray, np.ndarray]

_CHUNK_ROWS = 64
_SMALLEST_NORM = 1e-12  # as torch.nn.functional.normalize: a zero vector scores 0


def exact_search(
    queries: Vectors,
    database: Vectors,
    k: int,
    dims: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    database_rows: int = 8192,
    query_rows: int = 1024,
    progress: bool = False,
) -> dict[int, Neighbours]:
    """The ``k`` nearest database rows of every query by cosine, as ``{dim: (indices, scores)}``.

    All sizes come from one pass: the inner products of a prefix are those of the next smaller one
    plus those of the coordinates between, so that together they cost little more than the largest
    alone. A score is the inner product of the prefixes divided by their lengths, in float32, which
    is that of prefixes scaled to length 1 (`mrl.unit_prefix`).

    Indices are ``(Q, k)`` int64 and scores ``(Q, k)`` float32 arrays, best first, equal scores by
    lower index; equal vectors get equal scores wherever they stand in the database. Both inputs are
    read in blocks, so memory-mapped arrays larger than the memory are fine.

    Args:
        queries: ``(Q, D)``, raw (not normalised), an array or tensor on any device.
        database: ``(N, D)``, likewise.
        k: Neighbours per query, 1 to N.
        dims: Prefix sizes, each 1 to D.
        device: Where to compute.
        database_rows: Database vectors in memory at a time.
        query_rows: Queries in memory at a time.
        progress: Show a progress bar on stderr if the search takes more than a moment.

    Raises:
        UserError: ``k`` or a size does not fit the database, the two widths differ, or a vector
            holds NaN or infinity up to the largest size (or its length is beyond float32); the
            message names its row.
    """
    _check(queries, database, k, dims)
    num_queries, num_rows = len(queries), len(database)
    sizes = sorted(set(dims))
    queries, database = queries[:, : sizes[-1]], database[:, : sizes[-1]]  # what lies beyond need not be read
    best = {dim: Best(num_queries, k, device) for dim in sizes}
    query_scales = _query_scales(queries, sizes, device, query_rows)
    blocks = _blocks(num_rows, database_rows)
    # Matrix products round differently in the last columns of a block of odd size, and equal vectors would score
    # apart: all blocks have one size, a multiple of 64, filled up with zero vectors.
    block_rows = len(blocks[0]) * _CHUNK_ROWS
    # Gathered where the database is, so that a device gets it in one transfer.
    gathered = torch.empty(block_rows, sizes[-1], device=database.device if isinstance(database, Tensor) else "cpu")
    products = torch.empty(min(query_rows, num_queries), block_rows, device=device)
    with progress_bar(show=progress, total=num_rows * num_queries, desc="search", unit="pair") as bar:
        for starts in blocks:
            read = _read_chunks(database, starts, gathered)
            block = gathered.to(device)
            count, indices = len(read), torch.from_numpy(read).to(device)
            row_scales = inverse_lengths(block[:count], sizes, read, "database")
            row_scales = torch.nn.functional.pad(row_scales, (0, block_rows - count), value=1.0)
            for first in range(0, num_queries, query_rows):
                some = _read(queries, first, query_rows, device)
                rows = slice(first, first + len(some))
                done = 0
                for size, dim in enumerate(sizes):
                    product = products[: len(some)]
                    product.addmm_(some[:, done:dim], block[:, done:dim].T, beta=min(done, 1))
                    product[:, count:] = -torch.inf
                    best[dim].add(rows, product, row_scales[size], query_scales[size, rows, None], indices)
                    done = dim
                bar.update(count * len(some))
    found = {dim: best[dim].ordered() for dim in dims}
    return {dim: (indices.cpu().numpy(), scores.cpu().numpy()) for dim, (indices, scores) in found.items()}


def _check(queries: Vectors, database: Vectors, k: int, dims: Sequence[int]) -> None:
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise UserError(
            f"queries {tuple(queries.shape)} and database {tuple(database.shape)} must be matrices of equal width"
        )
    if not 1 <= k <= len(database):
        raise UserError(
            f"k = {k} neighbours were asked of a database of {len(database)} vectors; allowed are 1 to {len(database)}"
        )
    if len(database) > MAX_ROWS:
        raise UserError(f"a database of {len(database)} vectors is too large; allowed are up to {MAX_ROWS}")
    if not dims or not all(1 <= dim <= database.shape[1] for dim in dims):
        raise UserError(f"prefix sizes {list(dims)} must be one or more of 1 to {database.shape[1]}")


def _blocks(num_rows: int, block_rows: int) -> list[np.ndarray]:
    """The first rows of the chunks of each block; together the blocks hold every row once.

    A block's chunks come from all over the database. Databases are often sorted by class; read from first to last they
    would bring a query whose class comes late better neighbours again and again. So the first blocks have rows of many
    classes, and later ones little that is better. On Tiny-ImageNet that halves the time of a search.
    """
    starts = np.arange(0, num_rows, _CHUNK_ROWS)
    num_blocks = min(len(starts), math.ceil(num_rows / block_rows))
    return [starts[block::num_blocks] for block in range(num_blocks)]


def _read_chunks(vectors: Vectors, starts: np.ndarray, block: Tensor) -> np.ndarray:
    """Write the chunks that begin at ``starts`` into ``block``, zeros after them; returns the index of each row."""
    indices = (starts[:, None] + np.arange(_CHUNK_ROWS)).reshape(-1)
    indices = indices[indices < len(vectors)]
    for chunk, start in enumerate(starts.tolist()):
        rows = _read(vectors, start, _CHUNK_ROWS, block.device)
        block[chunk * _CHUNK_ROWS :][: len(rows)] = rows
    block[len(indices) :] = 0
    return indices


def _read(vectors: Vectors, start: int, count: int, device: torch.device | str) -> Tensor:
    """Rows ``start`` to ``start + count`` of ``vectors`` as a float32 tensor; not a copy where none is needed."""
    rows = vectors[start : start + count]
    if isinstance(rows, np.ndarray):
        # torch wants memory that it may write to, which a file mapped for reading is not.
        rows = torch.from_numpy(np.require(rows, np.float32, ["C", "W"]))
    return rows.detach().to(device, torch.float32)


def inverse_lengths(block: Tensor, sizes: Sequence[int], rows: Sequence[int] | np.ndarray, name: str) -> Tensor:
    """One over the length of every prefix of every vector: ``(G, n)`` float32 for ``block`` ``(n, D)``.

    A vector of length 0 gets 1e12, as in `mrl.unit_prefix`: it scores 0 with everything.

    Args:
        block: Vectors, as wide as the largest size.
        sizes: Prefix sizes, ascending.
        rows: The number of each vector, for errors.
        name: What the vectors are, for errors.

    Raises:
        UserError: A vector holds NaN or infinity, or its squared length is beyond float32.
    """
    parts = [torch.linalg.vector_norm(block[:, a:b], dim=1) for a, b in itertools.pairwise([0, *sizes])]
    squares = torch.stack(parts).square_().cumsum(dim=0)
    finite = squares[-1].isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        what = "is too long for float32" if block[row].isfinite().all() else "holds NaN or infinity"
        raise UserError(f"row {rows[row]} of the {name} {what}, so it has no neighbours")
    return squares.sqrt_().clamp_(min=_SMALLEST_NORM).reciprocal_()


def _query_scales(queries: Vectors, sizes: Sequence[int], device: torch.device | str, query_rows: int) -> Tensor:
    starts = range(0, len(queries), query_rows)
    blocks = (
        inverse_lengths(_read(queries, first, query_rows, device), sizes, range(first, first + query_rows), "queries")
        for first in starts
    )
    return torch.cat([torch.empty(len(sizes), 0, device=device), *blocks], dim=1)
