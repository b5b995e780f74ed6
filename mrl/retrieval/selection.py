"""The k best of a stream of scores, exactly and in a fixed order.

A score and its index are packed into one integer that is larger for a better neighbour: the score
decides, and of equal scores the lower index. No two keys are equal, so any way to select the
largest gives the same answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROWS = 2**32
_LOW_BITS = MAX_ROWS - 1
_SIGN_KEEPING_BITS = 2**31 - 1
_NOTHING = -(2**63)
# A maximum of so many scores is looked at before the scores are.
_GROUP_SIZE = 16


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
        worst: ``(Q, 1)`` float32, the lowest score kept; minus infinity while there are fewer than k.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device | str) -> None:
        self.keys = torch.full((num_queries, k), _NOTHING, device=device)
        self.worst = torch.full((num_queries, 1), -torch.inf, device=device)

    def add(self, rows: slice, scores: Tensor, scale: Tensor, start: int) -> None:
        """Let ``scores * scale`` of database rows from ``start`` on compete for the places of the queries ``rows``.

        All earlier database rows have lower indices, so a score must be higher than the worst kept to displace it.
        Scores are read in groups: only a group whose maximum is high enough is looked into.

        Args:
            rows: Which queries.
            scores: ``(B, n)`` with n a multiple of 16; minus infinity never competes.
            scale: ``(B, 1)``, 0 or more.
            start: Database row of the first column.
        """
        worst, k = self.worst[rows], self.keys.shape[1]
        group_size = _group_size(scores.shape[1], k)
        groups = scores.view(len(scores), group_size, -1)
        tops = groups.amax(dim=1) * scale
        promising = tops > worst
        floor = worst
        if tops.shape[1] > k and promising.sum() > 2 * k * len(scores):
            # At least k scores reach the k-th highest maximum, so nothing below it can stay.
            floor = tops.topk(k, dim=1).values[:, -1:]
            promising &= tops >= floor
        query, group = promising.nonzero(as_tuple=True)
        members = groups[query, :, group] * scale[query]
        wanted = (members > worst[query]) & (members >= floor[query])
        pair, member = wanted.nonzero(as_tuple=True)
        if len(pair):
            keys = pack(members[pair, member], start + member * groups.shape[2] + group[pair])
            self._insert(rows, query[pair], keys)

    def _insert(self, rows: slice, query: Tensor, keys: Tensor) -> None:
        """Let ``keys`` ``(m,)`` of the queries ``query`` ``(m,)``, ascending, compete with those kept."""
        kept = self.keys[rows]
        k = kept.shape[1]
        counts = torch.bincount(query, minlength=len(kept))
        place = torch.arange(len(query), device=keys.device) - (counts.cumsum(0) - counts)[query]
        both = keys.new_full((len(kept), k + int(counts.max())), _NOTHING)
        both[:, :k] = kept
        both[query, k + place] = keys
        self.keys[rows] = both.topk(k, dim=1, sorted=False).values
        lowest = self.keys[rows].amin(dim=1, keepdim=True)
        self.worst[rows] = torch.where(lowest == _NOTHING, -torch.inf, unpack(lowest)[1])

    def ordered(self) -> tuple[Tensor, Tensor]:
        """Indices ``(Q, k)`` int64 and scores ``(Q, k)`` float32, best first."""
        return unpack(self.keys.sort(dim=1, descending=True).values)


def _group_size(num_scores: int, k: int) -> int:
    """Scores to a group: few enough that the groups outnumber ``k`` where possible."""
    size = _GROUP_SIZE
    while size > 1 and num_scores // size < 2 * k:
        size //= 2
    return size
