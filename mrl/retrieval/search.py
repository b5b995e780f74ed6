"""Exact nearest neighbours by cosine similarity, at any set of prefix sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mrl.errors import UserError
from mrl.nesting import unit_prefix
from mrl.progress import progress as progress_bar

Vectors = np.ndarray | Tensor
Neighbours = tuple[np.ndarray, np.ndarray]

_ROW_MULTIPLE = 64


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

    At each size the prefix is taken first and scaled to length 1 after, in float32. Indices are
    ``(Q, k)`` int64 and scores ``(Q, k)`` float32 arrays, best first, equal scores by lower index;
    equal vectors get equal scores wherever they stand in the database. Both inputs are read in
    blocks, so memory-mapped arrays larger than the memory are fine.

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
            holds NaN or infinity; the message names its row.
    """
    _check(queries, database, k, dims)
    num_queries, num_rows = len(queries), len(database)
    best = {dim: _empty(num_queries, k, device) for dim in dims}
    # Matrix products round differently in the last columns of a block of odd size, and equal vectors would score
    # apart: all blocks have one size, a multiple of 64, the last filled up with zero vectors.
    block_rows = math.ceil(num_rows / math.ceil(num_rows / database_rows))
    block_rows += -block_rows % _ROW_MULTIPLE
    total = num_rows * num_queries * len(best)
    with progress_bar(show=progress, total=total, desc="search", unit="pair") as bar:
        for start in range(0, num_rows, block_rows):
            block = _read(database, start, block_rows, device, "database")
            count = len(block)
            block = torch.nn.functional.pad(block, (0, 0, 0, block_rows - count))
            units = {dim: unit_prefix(block, dim) for dim in best}
            for first in range(0, num_queries, query_rows):
                block_queries = _read(queries, first, query_rows, device, "queries")
                rows = slice(first, first + len(block_queries))
                for dim, (indices, scores) in best.items():
                    new = (unit_prefix(block_queries, dim) @ units[dim].T)[:, :count]
                    _merge(indices[rows], scores[rows], new, start)
                bar.update(count * len(block_queries) * len(best))
    return {dim: (indices.cpu().numpy(), scores.cpu().numpy()) for dim, (indices, scores) in best.items()}


def _check(queries: Vectors, database: Vectors, k: int, dims: Sequence[int]) -> None:
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise UserError(
            f"queries {tuple(queries.shape)} and database {tuple(database.shape)} must be matrices of equal width"
        )
    if not 1 <= k <= len(database):
        raise UserError(
            f"k = {k} neighbours were asked of a database of {len(database)} vectors; allowed are 1 to {len(database)}"
        )
    if not dims or not all(1 <= dim <= database.shape[1] for dim in dims):
        raise UserError(f"prefix sizes {list(dims)} must be one or more of 1 to {database.shape[1]}")


def _empty(num_queries: int, k: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    indices = torch.full((num_queries, k), -1, dtype=torch.int64, device=device)
    return indices, torch.full((num_queries, k), -torch.inf, device=device)


def _read(vectors: Vectors, start: int, count: int, device: torch.device | str, name: str) -> Tensor:
    """Rows ``start`` to ``start + count`` of ``vectors`` as a float32 tensor, found to be finite."""
    rows = vectors[start : start + count]
    block = rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows, dtype=np.float32))
    block = block.detach().to(device, torch.float32)
    finite = block.isfinite().all(dim=1)
    if not finite.all():
        row = start + int((~finite).nonzero()[0])
        raise UserError(f"row {row} of the {name} holds NaN or infinity, so it has no neighbours")
    return block


def _merge(indices: Tensor, scores: Tensor, new: Tensor, start: int) -> None:
    """Put the scores ``new`` ``(B, n)`` of database rows from ``start`` on into the best ``k`` so far, in place.

    All earlier rows have lower indices, so a new score must be higher than the worst kept to displace it.
    """
    k = scores.shape[1]
    rows = (new.amax(dim=1) > scores[:, -1]).nonzero()[:, 0]
    if not len(rows):
        return
    new = new[rows]
    columns = _top_columns(new, min(k, new.shape[1]))
    both_scores = torch.cat([scores[rows], new.gather(1, columns)], dim=1)
    both_indices = torch.cat([indices[rows], columns + start], dim=1)
    # The sort keeps the order of equals: what is kept stands before what is new, and that in ascending order.
    sorted_scores, order = both_scores.sort(dim=1, descending=True, stable=True)
    scores[rows] = sorted_scores[:, :k]
    indices[rows] = both_indices.gather(1, order)[:, :k]


def _top_columns(scores: Tensor, k: int) -> Tensor:
    """Columns ``(B, k)`` of the ``k`` highest of each row, ascending; among equals at the edge, the first ones."""
    if k == scores.shape[1]:
        return torch.arange(k, device=scores.device).expand(len(scores), k)
    # topk picks freely among equals. It matters only where the first one left out equals the last one kept.
    values, columns = scores.topk(k + 1, dim=1)
    tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
    columns = columns[:, :k].sort(dim=1).values
    if len(tied):
        edge = values[tied, k - 1 : k]
        above, at_edge = scores[tied] > edge, scores[tied] == edge
        wanted = k - above.sum(dim=1, keepdim=True)
        keep = above | (at_edge & (at_edge.cumsum(dim=1) <= wanted))
        columns[tied] = keep.nonzero()[:, 1].view(-1, k)
    return columns
