"""The k best of a stream of scores, exactly and in a fixed order.

A score and its index are packed into one integer that is larger for a better neighbour: the score
decides, and of equal scores the lower index. No two keys are equal, so any way to select the
largest gives the same answer.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MAX_ROWS = 2**32
_LOW_BITS = MAX_ROWS - 1
_SIGN_KEEPING_BITS = 2**31 - 1
_NOTHING = -(2**63)
# Scores of so many queries and a block of the database stay in the processor's cache between two operations.
_CACHED_ROWS = 64


def pack(scores: Tensor, indices: Tensor) -> Tensor:
    """Keys ``(...)`` int64 of float32 scores and their indices (0 to 2^32 - 1): a better neighbour has a larger key."""
    bits = (scores + 0.0).view(torch.int32)  # the sum makes a plus of a minus zero, which are equal scores
    # As integers, negative floats ascend the wrong way round.
    ascending = bits ^ ((bits >> 31) & _SIGN_KEEPING_BITS)
    return (ascending.long() << 32) | (_LOW_BITS - indices)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The indices ``(...)`` int64 and scores ``(...)`` float32 of `pack`."""
    ascending = (keys >> 32).int()
    return _LOW_BITS - (keys & _LOW_BITS), (ascending ^ ((ascending >> 31) & _SIGN_KEEPING_BITS)).view(torch.float32)


class Best:
    """The ``k`` best neighbours so far of each of ``num_queries`` queries.

    Attributes:
        keys: ``(Q, k)`` int64 of `pack`, in no order.
        lowest: ``(Q, 1)`` int64, the lowest of them; below every key while there are fewer than k.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device | str) -> None:
        self.keys = torch.full((num_queries, k), _NOTHING, device=device)
        self.lowest = torch.full((num_queries, 1), _NOTHING, device=device)

    def add(self, rows: slice, products: Tensor, row_scales: Tensor, query_scales: Tensor, indices: Tensor) -> None:
        """Let the scores of database rows compete for the places of the queries ``rows``.

        A score is a product times its database row's scale times its query's scale. The database's
        rows come in any order, each once. Scores are read in groups: only a group whose maximum
        reaches the worst kept is looked into.

        Args:
            rows: Which queries.
            products: ``(B, n)``, contiguous, n a multiple of 64; minus infinity never competes.
            row_scales: ``(n,)``, above 0.
            query_scales: ``(B, 1)``, above 0.
            indices: int64, the database row of each column; columns of minus infinity at the end need none.
        """
        k, width = self.keys.shape[1], products.shape[1]
        group_size = _group_size(width, k)
        tops = _group_maxima(products, row_scales, group_size).mul_(query_scales)
        index, worst = unpack(self.lowest[rows])
        worst = torch.where(self.lowest[rows] == _NOTHING, -torch.inf, worst)
        # A score that only equals the worst needs a lower index. Where none is left, many equals cost nothing more.
        above = torch.nextafter(worst, torch.full_like(worst, torch.inf))
        floor = torch.where(indices.min() < index, worst, above).clamp_(min=torch.finfo(torch.float32).min)
        promising = tops >= floor
        if tops.shape[1] > k and promising.sum() > 2 * k * len(products):
            # At least k scores reach the k-th highest maximum, so nothing below it can stay.
            floor = torch.maximum(floor, _largest(tops, k).amin(dim=1, keepdim=True))
            promising = tops >= floor
        found = _true_places(promising)
        query = found // tops.shape[1]
        group = found - query * tops.shape[1]
        columns = group[:, None] + torch.arange(group_size, device=group.device) * tops.shape[1]
        places = (columns + query[:, None] * width).view(-1)
        scores = products.view(-1).index_select(0, places).mul_(row_scales.index_select(0, columns.view(-1)))
        scores = scores.view_as(columns).mul_(query_scales.index_select(0, query))
        wanted = _true_places(scores >= floor.index_select(0, query))
        if len(wanted):
            chosen = columns.view(-1).index_select(0, wanted)
            keys = pack(scores.view(-1).index_select(0, wanted), indices.index_select(0, chosen))
            self._insert(rows, query.index_select(0, wanted // group_size), keys)

    def _insert(self, rows: slice, query: Tensor, keys: Tensor) -> None:
        """Let ``keys`` ``(m,)`` of the queries ``query`` ``(m,)``, ascending, compete with those kept."""
        kept = self.keys[rows]
        k = kept.shape[1]
        counts = torch.bincount(query, minlength=len(kept))
        place = torch.arange(len(query), device=keys.device) - (counts.cumsum(0) - counts)[query]
        both = keys.new_full((len(kept), k + int(counts.max())), _NOTHING)
        both[:, :k] = kept
        both[query, k + place] = keys
        best = _largest(both, k)
        self.keys[rows] = best
        self.lowest[rows] = best.amin(dim=1, keepdim=True)

    def ordered(self) -> tuple[Tensor, Tensor]:
        """Indices ``(Q, k)`` int64 and scores ``(Q, k)`` float32, best first."""
        return unpack(descending(self.keys))


def descending(keys: Tensor) -> Tensor:
    """``keys`` ``(Q, k)`` with each row sorted, best first."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1, descending=True).values
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)).flip(1)


def _largest(values: Tensor, k: int) -> Tensor:
    """The ``k`` largest of each row, in no order."""
    if values.device.type != "cpu":
        return values.topk(k, dim=1, sorted=False).values
    return torch.from_numpy(np.partition(values.numpy(), -k, axis=1)[:, -k:])  # several times faster than topk


def _true_places(mask: Tensor) -> Tensor:
    """Places of the true entries of ``mask``, counted through all of it, ascending."""
    if mask.device.type != "cpu":
        return mask.reshape(-1).nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # ten times faster than nonzero


def _group_maxima(products: Tensor, row_scales: Tensor, group_size: int) -> Tensor:
    """Maxima ``(B, n / group_size)`` of ``products * row_scales``; group i holds columns i, i + n / group_size, ..."""
    maxima = products.new_empty(len(products), products.shape[1] // group_size)
    step = _CACHED_ROWS if products.device.type == "cpu" else max(len(products), 1)
    scaled = torch.empty_like(products[:step])
    for first in range(0, len(products), step):
        some = products[first : first + step]
        torch.mul(some, row_scales, out=scaled[: len(some)])
        torch.amax(scaled[: len(some)].view(len(some), group_size, -1), dim=1, out=maxima[first : first + step])
    return maxima


def _group_size(num_scores: int, k: int) -> int:
    """Scores to a group, a power of two up to 64.

    Every group is looked at, and about ``k`` of them are looked into, each of whose scores costs about as much as ten
    groups: the least work is near the square root of ``num_scores / (2 * k)``.
    """
    return min(64, 2 ** int(math.log2(max(1.0, num_scores / (2 * k))) / 2))
