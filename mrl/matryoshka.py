"""Nesting lists and prefixes: the idea of the paper (section 3).

An embedding ``z`` of width ``D`` is trained so that its first ``dim`` coordinates are an embedding
too, for every ``dim`` of the nesting list (the paper's M).

Nested linear classifiers (paper, section 3 and algorithm 2).

Losses over prefixes (paper, equation 1).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl.errors import UserError

SMALLEST_DIM = 8


def default_nesting_list(width: int) -> tuple[int, ...]:
    """Sizes from halving ``width`` while they stay whole and at least 8, ascending.

    >>> default_nesting_list(2048)
    (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    >>> default_nesting_list(768)
    (12, 24, 48, 96, 192, 384, 768)
    """
    dims = [width]
    while dims[-1] % 2 == 0 and dims[-1] // 2 >= SMALLEST_DIM:
        dims.append(dims[-1] // 2)
    return tuple(reversed(dims))


def check_nesting_list(nesting_list: Sequence[int], width: int | None = None) -> tuple[int, ...]:
    """The nesting list as a tuple, once it is known to be possible.

    A single size below ``width`` is the fixed-feature baseline. A longer list that stops short of
    ``width`` leaves coordinates untrained, which is allowed but warned of.

    Raises:
        UserError: The list is empty, holds something other than positive whole numbers, is not
            strictly ascending, or holds a size above ``width``.
    """
    dims = tuple(nesting_list)
    shown = list(dims)
    if not dims:
        raise UserError("the nesting list is empty; give at least one prefix size, e.g. [8, 16, 32]")
    for dim in dims:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise UserError(f"the nesting list {shown} holds {dim!r}; prefix sizes are whole numbers above 0")
    if any(small >= large for small, large in itertools.pairwise(dims)):
        raise UserError(f"the nesting list {shown} must be strictly ascending, e.g. {sorted(set(dims))}")
    if width is not None and dims[-1] > width:
        raise UserError(f"the nesting list {shown} asks for {dims[-1]} dims, but the embedding has only {width}")
    if width is not None and len(dims) > 1 and dims[-1] < width:
        warnings.warn(
            f"the nesting list {shown} leaves coordinates {dims[-1]} to {width - 1} of the embedding untrained; "
            f"end it with {width} to train the full width",
            stacklevel=2,
        )
    return dims


def prefix(z: Tensor, dim: int) -> Tensor:
    """The first ``dim`` coordinates of ``z``: ``(..., D) -> (..., dim)``, a view, not normalized.

    Raises:
        UserError: ``dim`` is not between 1 and the width of ``z``.
    """
    if not 1 <= dim <= z.shape[-1]:
        raise UserError(
            f"cannot take {dim} dims of an embedding of width {z.shape[-1]}; allowed are 1 to {z.shape[-1]}"
        )
    return z[..., :dim]


def unit_prefix(z: Tensor, dim: int) -> Tensor:
    """The first ``dim`` coordinates, then scaled to length 1 in float32: ``(..., D) -> (..., dim)``.

    The order matters: a prefix of a normalized vector is not normalized, and its inner products
    are not cosines. Retrieval at any size goes through this one function.

    Raises:
        UserError: ``dim`` is not between 1 and the width of ``z``.
    """
    return F.normalize(prefix(z, dim).float(), dim=-1)


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


def nested_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of each granularity ``(G,)``; the training loss is their (weighted) **sum**.

    Args:
        logits: ``(G, B, C)`` from `NestedLinear`.
        labels: ``(B,)`` int64 classes, or ``(B, C)`` class probabilities (mixup, cutmix).
        label_smoothing: Share of the target spread over all classes, inside each cross-entropy.
    """
    return torch.stack([F.cross_entropy(each, labels, label_smoothing=label_smoothing) for each in logits])


def check_weights(weights: Sequence[float] | None, nesting_list: Sequence[int]) -> tuple[float, ...]:
    """The relative importance c_m of each prefix, as a tuple; 1 for each when ``weights`` is None.

    Raises:
        UserError: There is not one weight per prefix, one is negative or not finite, or all are 0.
    """
    if weights is None:
        return (1.0,) * len(nesting_list)
    if len(weights) != len(nesting_list):
        raise UserError(
            f"{len(weights)} loss weights {list(weights)} for {len(nesting_list)} prefix sizes {list(nesting_list)}; "
            "give one per size"
        )
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise UserError(f"loss weights {list(weights)} must be finite, 0 or more, and not all 0")
    return tuple(float(weight) for weight in weights)


class MatryoshkaLoss(nn.Module):
    """Any loss on embeddings, summed over their prefixes: ``sum_m c_m loss_fn(z1[:, :m], z2[:, :m], ...)``.

    Called as ``loss(*embeddings, *rest)``. The leading floating-point tensors of shape ``(B, D)``,
    with D at least the largest size, are embeddings and are cut to each prefix: one for a
    classification-like loss, two for pairs, three for triplets. Everything after them, and every
    keyword argument, reaches ``loss_fn`` untouched; pass a float matrix that is not an embedding
    by keyword. Where the loss works on unit vectors it must normalize what it is given, so that
    each prefix is normalized separately (as the paper does for ALIGN).

    Args:
        loss_fn: Returns a scalar from embeddings ``(B, m)`` and whatever else it takes.
        nesting_list: Prefix sizes, strictly ascending.
        weights: Relative importance c_m of each size; 1 for each when None.

    Raises:
        UserError: The sizes or weights are impossible, or a call brings no embedding.
    """

    weights: Tensor

    def __init__(
        self, loss_fn: Callable[..., Tensor], nesting_list: Sequence[int], weights: Sequence[float] | None = None
    ):
        super().__init__()
        self.loss_fn = loss_fn
        self.nesting_list = check_nesting_list(nesting_list)
        self.register_buffer("weights", torch.tensor(check_weights(weights, nesting_list)), persistent=False)

    def _is_embedding(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.ndim == 2
            and value.shape[1] >= self.nesting_list[-1]
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum over prefixes, a scalar on the embeddings' device."""
        count = 0
        while count < len(args) and self._is_embedding(args[count]):
            count += 1
        if count == 0:
            raise UserError(
                f"MatryoshkaLoss needs an embedding first: a float tensor (B, D) with D >= {self.nesting_list[-1]}"
            )
        embeddings, rest = args[:count], args[count:]
        losses = [self.loss_fn(*(prefix(z, dim) for z in embeddings), *rest, **kwargs) for dim in self.nesting_list]
        # The weights follow the embeddings, also where nobody moved this module to their device.
        return (torch.stack(losses) * self.weights.to(losses[0])).sum()
