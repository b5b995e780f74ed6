"""Nested linear classifiers (paper, section 3 and algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl.nesting import check_nesting_list, prefix


class NestedLinear(nn.Module):
    """One linear classifier per prefix of the embedding; logits ``(G, B, C)``, smallest prefix first.

    The one head of this package. What a model is called follows from two values:

    ========================  =====  =============================================
    nesting_list              tied   model
    ========================  =====  =============================================
    ``[D]``                          the plain classifier (FF-D)
    ``[d]``, d < D                   fixed feature FF-d: reads the first d coordinates
    ``[8, 16, ..., D]``       False  MRL: a classifier of its own for every size
    ``[8, 16, ..., D]``       True   MRL-E: one classifier; size d uses its first d columns
    ========================  =====  =============================================

    Args:
        nesting_list: Prefix sizes, strictly ascending.
        num_classes: Number of classes C.
        tied: Share one weight ``(C, D)`` and one bias between all sizes (MRL-E).

    Raises:
        UserError: The nesting list is impossible; see `check_nesting_list`.
    """

    def __init__(self, nesting_list: Sequence[int], num_classes: int, tied: bool = False):
        super().__init__()
        self.nesting_list = check_nesting_list(nesting_list)
        self.num_classes = num_classes
        self.tied = tied
        dims = self.nesting_list[-1:] if tied else self.nesting_list
        self.classifiers = nn.ModuleList(nn.Linear(dim, num_classes) for dim in dims)

    def weight_and_bias(self, g: int) -> tuple[Tensor, Tensor]:
        """The classifier of granularity ``g``: weight ``(C, nesting_list[g])`` and bias ``(C,)``."""
        classifier = self.classifiers[0 if self.tied else g]
        return classifier.weight[:, : self.nesting_list[g]], classifier.bias  # type: ignore[index,return-value]

    def forward(self, z: Tensor) -> Tensor:
        """Logits ``(G, B, C)`` of embeddings ``z`` ``(B, D)``; coordinates past the last size are not read."""
        return torch.stack(
            [F.linear(prefix(z, dim), *self.weight_and_bias(g)) for g, dim in enumerate(self.nesting_list)]
        )

    def extra_repr(self) -> str:
        return f"nesting_list={list(self.nesting_list)}, num_classes={self.num_classes}, tied={self.tied}"
