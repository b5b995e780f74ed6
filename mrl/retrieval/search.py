"""Exact nearest neighbors by cosine or inner product, at any number of prefix sizes in one pass over the database.

Of a stream of scores the k best are kept. A score and its index are packed into one integer key, which is larger for a
better neighbor: by score, and for equal scores by lower index. No two keys are equal, so every way to select the
largest keys gives the same answer.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mrl.errors import UserError
from mrl.progress import progress as progress_bar

Vectors = np.ndarray | Tensor
Neighbors = tuple[np.ndarray, np.ndarray]

_MAX_INDEX = 2**32 - 1
_ALL_BUT_SIGN = 2**31 - 1
_EMPTY = -(2**63)
_CHUNK = 64
_SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


def exact_search(
    queries: Vectors,
    database: Vectors,
    k: int,
    dims: Sequence[int],
    *,
    metric: Literal["cosine", "inner product"] = "cosine",
    device: torch.device | str = "cpu",
    database_rows: int = 8192,
    query_rows: int = 1024,
    progress: bool = False,
) -> dict[int, Neighbors]:
    """Return the ``k`` nearest neighbors of every query, as ``{dim: (indices, scores)}``.

    Indices are ``(Q, k)`` int64 and scores ``(Q, k)`` float32, best first, equal scores by lower index. A score is the
    inner product of the two prefixes divided by their norms, in float32. The inner products at one size are those at
    the next smaller size plus those of the coordinates between, so all sizes cost little more than the largest alone.
    A prefix that is all zero has no cosine; its score is 0 with any other, and a warning counts such vectors.

    Args:
        queries, database: ``(Q, D)`` and ``(N, D)``, raw (not normalized), arrays or tensors on any device; read in
            blocks, so memory-mapped files may be larger than the memory.
        k: 1 to N.
        dims: Prefix sizes, 1 to D.
        metric: With "inner product", scores are not divided by the norms.
        device: Where to compute.
        database_rows, query_rows: Vectors in memory at a time.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: The arguments do not fit each other, or a vector holds NaN or infinity.
    """
    check_vectors(queries, database, dims)
    if not 1 <= k <= len(database):
        raise UserError(f"k is {k}; allowed: 1 to {len(database)}, the number of database vectors")
    sizes, num_queries = sorted(set(dims)), len(queries)
    queries, database = queries[:, : sizes[-1]], database[:, : sizes[-1]]
    query_parts = [slice(first, min(first + query_rows, num_queries)) for first in range(0, num_queries, query_rows)]
    query_scales = [inverse_norms(_read(queries, part, device), sizes, "query", part.start) for part in query_parts]
    zero_database = torch.zeros(len(sizes), dtype=torch.int64, device=device)
    zero_queries = sum(map(_count_zero, query_scales), zero_database)
    if metric == "inner product":
        query_scales = [torch.ones_like(scales) for scales in query_scales]
    best = {dim: torch.full((num_queries, k), _EMPTY, device=device) for dim in sizes}
    blocks = _blocks(len(database), database_rows)
    # All blocks have one size, a multiple of 64, and the last are padded. At odd sizes a matrix product rounds the last
    # columns differently, so that equal vectors would get different scores.
    block_rows = len(blocks[0]) * _CHUNK
    gathered = torch.empty(block_rows, sizes[-1], device=database.device if isinstance(database, Tensor) else "cpu")
    products = torch.empty(min(query_rows, num_queries), block_rows, device=device)
    scaled = torch.empty_like(products)
    with progress_bar(show=progress, total=len(database) * num_queries, desc="search", unit="pair") as bar:
        for starts in blocks:
            indices = _read_chunks(database, starts, gathered).to(device)
            block = gathered.to(device)
            row_scales = inverse_norms(block, sizes, "database", indices)
            zero_database = zero_database + _count_zero(row_scales[:, : len(indices)])
            if metric == "inner product":
                row_scales.fill_(1)
            for part, scales in zip(query_parts, query_scales, strict=True):
                some, product, done = _read(queries, part, device), products[: part.stop - part.start], 0
                for size, dim in enumerate(sizes):
                    product.addmm_(some[:, done:dim], block[:, done:dim].T, beta=min(done, 1))
                    product[:, len(indices) :] = -torch.inf
                    scores = torch.mul(product, row_scales[size], out=scaled[: len(some)])
                    _keep_best(best[dim][part], scores, scales[size, :, None], indices)
                    done = dim
                bar.update(len(indices) * len(some))
    counts = [
        f"at {dim} dims {of_queries:,} of {num_queries:,} queries and {of_database:,} of {len(database):,} vectors"
        for dim, of_queries, of_database in zip(sizes, zero_queries.tolist(), zero_database.tolist(), strict=True)
        if of_queries or of_database
    ]
    if counts:
        warnings.warn(f"prefixes are all zero, which score 0 with any other: {', '.join(counts)}", stacklevel=2)
    found = {dim: unpack(descending(best[dim])) for dim in dims}
    return {dim: (indices.cpu().numpy(), scores.cpu().numpy()) for dim, (indices, scores) in found.items()}


def check_vectors(queries: Vectors, database: Vectors, dims: Sequence[int]) -> None:
    """Check that both are matrices of one width, and that the prefix sizes fit it."""
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise UserError(
            f"queries {tuple(queries.shape)} and database {tuple(database.shape)} must be matrices of equal width"
        )
    if not dims or not all(1 <= dim <= database.shape[1] for dim in dims):
        raise UserError(f"prefix sizes are {list(dims)}; allowed: one or more of 1 to {database.shape[1]}")


def check_ids(ids: Sequence[str] | None, vectors: Vectors) -> None:
    """Check that there is one id for each vector, if there are any."""
    if ids is not None and len(ids) != len(vectors):
        raise UserError(f"{len(ids)} ids for {len(vectors)} vectors; give one for each")


def inverse_norms(vectors: Tensor, dims: Sequence[int], name: str, indices: Tensor | int = 0) -> Tensor:
    """Return 1 / norm of every prefix of ``(n, D)``, ``(G, n)`` float32; 1e12 for a zero vector, which scores 0.

    ``name`` and ``indices`` (of each vector, or of the first) are for the error, if a vector is not finite.
    """
    parts = [torch.linalg.vector_norm(vectors[:, a:b], dim=1) for a, b in itertools.pairwise([0, *dims])]
    squares = torch.stack(parts).square_().cumsum(dim=0)
    if not squares[-1].isfinite().all():
        wrong = int((~squares[-1].isfinite()).nonzero()[0])
        position = int(indices[wrong]) if isinstance(indices, Tensor) else indices + wrong
        raise UserError(f"{name} vector {position} holds NaN or infinity, or is too long for float32")
    return squares.sqrt_().clamp_(min=_SMALLEST_NORM).reciprocal_()


def _count_zero(scales: Tensor) -> Tensor:
    return (scales >= 1 / _SMALLEST_NORM).sum(dim=1)


def count_zero_prefixes(vectors: np.ndarray, dims: Sequence[int]) -> dict[int, int]:
    """Return how many vectors ``(N, D)`` are zero in their first ``dim`` coordinates, as ``{dim: count}``, ascending.

    Features after a ReLU are never negative and often zero, so that small prefixes may be all zero.
    """
    counts = dict.fromkeys(sorted(dims), 0)
    for start in range(0, len(vectors), 65536):  # of a file, few in memory
        rows = vectors[start : start + 65536]
        for dim in counts:
            rows = rows[~np.any(rows[:, :dim], axis=1)]
            counts[dim] += len(rows)
    return counts


def describe_zero_prefixes(vectors: np.ndarray, dims: Sequence[int], what: str = "images") -> str:
    """Return a sentence that counts the all-zero prefixes of ``what``; an empty one if there are none."""
    counts = [f"{count:,} at {dim} dims" for dim, count in count_zero_prefixes(vectors, dims).items() if count]
    what = f"{len(vectors):,} {what}; at these sizes they have no neighbors"
    return f"all-zero prefixes: {', '.join(counts)}, of {what}" if counts else ""


def _blocks(num_rows: int, block_rows: int) -> list[np.ndarray]:
    """Return the first rows of the chunks of each block.

    A block takes chunks from all over the database. A database sorted by class, read in order, would bring better
    neighbors again and again; from mixed blocks most queries find good neighbors early. It halves the time of a search.
    """
    starts = np.arange(0, num_rows, _CHUNK)
    num_blocks = min(len(starts), math.ceil(num_rows / block_rows))
    return [starts[block::num_blocks] for block in range(num_blocks)]


def _read_chunks(vectors: Vectors, starts: np.ndarray, block: Tensor) -> Tensor:
    """Copy the chunks that begin at ``starts`` into ``block``, then zeros; return the index of each row, int64."""
    for chunk, start in enumerate(starts.tolist()):
        rows = _read(vectors, slice(start, start + _CHUNK), block.device)
        block[chunk * _CHUNK :][: len(rows)] = rows
    indices = (starts[:, None] + np.arange(_CHUNK)).reshape(-1)
    indices = indices[indices < len(vectors)]
    block[len(indices) :] = 0
    return torch.from_numpy(indices)


def _read(vectors: Vectors, rows: slice, device: torch.device | str) -> Tensor:
    """Return rows as float32 on ``device``, without a copy if possible."""
    some = vectors[rows]
    if isinstance(some, np.ndarray):
        some = torch.from_numpy(np.require(some, np.float32, ["C", "W"]))  # torch wants writable memory
    return some.detach().to(device, torch.float32)


def pack(scores: Tensor, indices: Tensor) -> Tensor:
    """Return int64 keys of float32 scores and indices below 2^32: a better neighbor has a larger key."""
    bits = (scores + 0.0).view(torch.int32)  # the sum turns -0.0 into 0.0
    ascending = bits ^ ((bits >> 31) & _ALL_BUT_SIGN)  # negative floats, read as integers, are in reverse order
    return (ascending.long() << 32) | (_MAX_INDEX - indices)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices (int64) and scores (float32) that `pack` was given."""
    ascending = (keys >> 32).int()
    return _MAX_INDEX - (keys & _MAX_INDEX), (ascending ^ ((ascending >> 31) & _ALL_BUT_SIGN)).view(torch.float32)


def _keep_best(kept: Tensor, scores: Tensor, query_scales: Tensor, indices: Tensor) -> None:
    """Replace the worst of the keys ``kept`` ``(B, k)`` by those of better scores among n database vectors, 64 | n.

    The scores are ``scores * query_scales``, ``(B, n)`` and ``(B, 1)``. Nearly all are below those already kept.
    Therefore the maxima of groups are compared first, and a group is read only if its maximum can be kept.

    Args:
        kept: Keys of `pack`, unsorted; `_EMPTY` where there is no neighbor yet.
        indices: Database positions of the columns; padded columns, which hold minus infinity, come last and have none.
    """
    k, width = kept.shape[1], scores.shape[1]
    lowest = kept.amin(dim=1, keepdim=True)
    index, worst = unpack(lowest)
    # A score that equals the worst kept one needs a lower index.
    worst = torch.where(indices.min() < index, worst, torch.nextafter(worst, torch.full_like(worst, torch.inf)))
    floor = torch.where(lowest == _EMPTY, torch.finfo(torch.float32).min, worst)
    # About k groups are read, and a score in them costs about ten times as much as a maximum.
    group_size = min(64, 2 ** int(math.log2(max(1.0, width / (2 * k))) / 2))
    num_groups = width // group_size  # group i holds columns i, i + num_groups, ...
    maxima = scores.view(len(scores), group_size, -1).amax(dim=1).mul_(query_scales)
    if num_groups > k and (lowest == _EMPTY).any():
        floor = torch.maximum(floor, _largest(maxima, k).amin(dim=1, keepdim=True))
    group = _true_positions(maxima >= floor)
    query = group // num_groups
    columns = (group - query * num_groups)[:, None] + torch.arange(group_size, device=group.device) * num_groups
    positions = (columns + query[:, None] * width).view(-1)
    candidates = scores.view(-1).index_select(0, positions).view_as(columns).mul_(query_scales[query])
    chosen = _true_positions(candidates >= floor[query])
    if not len(chosen):
        return
    # The new keys of each query, which ascend, as a row of a matrix.
    keys, query = pack(candidates.view(-1)[chosen], indices[columns.view(-1)[chosen]]), query[chosen // group_size]
    counts = torch.bincount(query, minlength=len(scores))
    column = torch.arange(len(query), device=keys.device) - (counts.cumsum(0) - counts)[query]
    new = keys.new_full((len(scores), int(counts.max())), _EMPTY)
    new[query, column] = keys
    kept[:] = _largest(torch.cat([kept, new], dim=1), k)


# On the CPU numpy is several times faster than torch at these three.
def descending(keys: Tensor) -> Tensor:
    """Return ``keys`` ``(Q, k)`` with each row sorted, best first."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1, descending=True).values
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)).flip(1)


def _largest(values: Tensor, k: int) -> Tensor:
    if values.device.type != "cpu":
        return values.topk(k, dim=1, sorted=False).values
    return torch.from_numpy(np.partition(values.numpy(), -k, axis=1)[:, -k:])


def _true_positions(mask: Tensor) -> Tensor:
    if mask.device.type != "cpu":
        return mask.reshape(-1).nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
