"""Matryoshka Representation Learning in one file: nesting lists, prefixes, nested heads, losses (paper, section 3).

An embedding ``z`` of width ``D`` is trained so that its first ``dim`` coordinates are an embedding too, for every
``dim`` of the nesting list (the paper's M)::

    head = NestedLinear([8, 16, ..., D], num_classes)
    losses = nested_cross_entropy(head(z), labels)  # (B, D) -> (G, B, C) -> (G,)
    losses.sum().backward()  # equation 1 with every weight c_m = 1
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


def default_nesting_list(width: int) -> tuple[int, ...]:
    """Halve ``width`` as long as the result is whole and at least 8; ascending.

    >>> default_nesting_list(2048)
    (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    >>> default_nesting_list(768)
    (12, 24, 48, 96, 192, 384, 768)
    """
    dims = [width]
    while dims[-1] % 2 == 0 and dims[-1] >= 16:
        dims.append(dims[-1] // 2)
    return tuple(reversed(dims))


def check_nesting_list(nesting_list: Sequence[int], width: int | None = None) -> tuple[int, ...]:
    """Return the nesting list as a tuple. A list that ends below ``width`` is allowed, with a warning."""
    dims, given = tuple(nesting_list), list(nesting_list)
    if not dims or any(isinstance(dim, bool) or not isinstance(dim, int) or dim < 1 for dim in dims):
        raise UserError(f"the nesting list is {given}; allowed are one or more positive integers, e.g. [8, 16, 32]")
    if any(small >= large for small, large in itertools.pairwise(dims)):
        raise UserError(f"the nesting list {given} must be strictly ascending, e.g. {sorted(set(dims))}")
    if width is not None and dims[-1] > width:
        raise UserError(f"the nesting list {given} asks for {dims[-1]} dims, but the embedding has only {width}")
    if width is not None and len(dims) > 1 and dims[-1] < width:  # a single dim is the fixed-feature baseline
        warnings.warn(
            f"the nesting list {given} leaves coordinates {dims[-1]} to {width - 1} of the embedding untrained; "
            f"end it with {width} to train the full width",
            stacklevel=2,
        )
    return dims


def prefix(z: Tensor, dim: int) -> Tensor:
    """Return the first ``dim`` coordinates of ``z``: ``(..., D) -> (..., dim)``, a view, not normalized."""
    if not 1 <= dim <= z.shape[-1]:
        raise UserError(f"cannot take {dim} dims of an embedding of width {z.shape[-1]}; allowed: 1 to {z.shape[-1]}")
    return z[..., :dim]


def unit_prefix(z: Tensor, dim: int) -> Tensor:
    """Return the first ``dim`` coordinates, then scaled to unit norm in float32: ``(..., D) -> (..., dim)``.

    The order matters: a prefix of a unit vector is not a unit vector. Retrieval at any dim uses this function.
    """
    return F.normalize(prefix(z, dim).float(), dim=-1)


class NestedLinear(nn.Module):
    """One linear classifier per prefix: embeddings ``(B, D)`` to logits ``(G, B, C)``, smallest prefix first.

    The one head of this package. Two values decide what a model is called:

    ========================  =====  =====================================================
    nesting_list              tied   model
    ========================  =====  =====================================================
    ``[D]``                          plain classifier (FF-D)
    ``[d]``, d < D                   fixed feature FF-d: reads the first d coordinates only
    ``[8, 16, ..., D]``       False  MRL: one classifier per dim
    ``[8, 16, ..., D]``       True   MRL-E: one shared classifier; dim d uses its first d columns
    ========================  =====  =====================================================

    Args:
        nesting_list: Prefix dims, strictly ascending.
        num_classes: Number of classes C.
        tied: Share one weight ``(C, D)`` and one bias between all dims (MRL-E; algorithm 2 of the paper).
        scaled: With ``tied``, multiply the logits of each dim by a learned number, at first 1, and divide the gradient
            of each column of the weight by the number of dims that use it. Not in the paper.
    """

    readers: Tensor

    def __init__(self, nesting_list: Sequence[int], num_classes: int, tied: bool = False, scaled: bool = False):
        super().__init__()
        self.nesting_list = check_nesting_list(nesting_list)
        self.num_classes = num_classes
        self.tied, self.scaled = tied, scaled
        if scaled and not tied:
            raise UserError("scaled is True, but the classifiers are not tied; allowed: scaled with tied=True")
        dims = self.nesting_list[-1:] if tied else self.nesting_list
        self.classifiers = nn.ModuleList(nn.Linear(dim, num_classes) for dim in dims)
        if scaled:
            self.log_scales = nn.Parameter(torch.zeros(len(self.nesting_list)))
            readers = torch.tensor(self.nesting_list)[:, None] > torch.arange(self.nesting_list[-1])
            self.register_buffer("readers", readers.sum(0).float(), persistent=False)
            self._divide_gradient()

    def _divide_gradient(self) -> None:
        weight: Any = self.classifiers[0].weight
        is_trained = weight.requires_grad
        weight.requires_grad_(True).register_hook(lambda gradient: gradient / self.readers)
        weight.requires_grad_(is_trained)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.scaled and not self.classifiers[0].weight._backward_hooks:  # a deep copy has none
            self._divide_gradient()

    def weights_and_biases(self) -> list[tuple[Tensor, Tensor]]:
        """Return the classifier of each dim of the nesting list: weight ``(C, dim)`` and bias ``(C,)``."""
        layers: Any = [self.classifiers[0]] * len(self.nesting_list) if self.tied else self.classifiers
        pairs = [(layer.weight[:, :dim], layer.bias) for layer, dim in zip(layers, self.nesting_list, strict=True)]
        if not self.scaled:
            return pairs
        return [(weight * s, bias * s) for (weight, bias), s in zip(pairs, self.log_scales.exp(), strict=True)]

    def forward(self, z: Tensor) -> Tensor:
        """Return logits ``(G, B, C)``; coordinates of ``z`` ``(B, D)`` beyond the largest dim are not read."""
        pairs = self.weights_and_biases()
        return torch.stack([F.linear(prefix(z, weight.shape[1]), weight, bias) for weight, bias in pairs])

    def extra_repr(self) -> str:
        return f"nesting_list={list(self.nesting_list)}, num_classes={self.num_classes}, tied={self.tied}"


def nested_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of each prefix, ``(G,)``. The training loss is their (weighted) **sum**.

    Args:
        logits: ``(G, B, C)`` from `NestedLinear`.
        labels: ``(B,)`` int64 classes, or ``(B, C)`` class probabilities (mixup, cutmix).
        label_smoothing: Share of the target spread over all classes, inside each cross-entropy.
    """
    return torch.stack([F.cross_entropy(each, labels, label_smoothing=label_smoothing) for each in logits])


def self_distillation(logits: Tensor) -> Tensor:
    """Return the mean KL divergence of each prefix's prediction from that of the largest prefix, ``(G,)``.

    The largest prefix is the teacher: its own divergence is 0, and it gets no gradient, as the deepest classifier in
    Zhang et al., "Be Your Own Teacher", ICCV 2019. Not in the paper.

    Args:
        logits: ``(G, B, C)`` from `NestedLinear`.
    """
    predictions = F.log_softmax(logits.float(), dim=-1)
    students, teacher = predictions[:-1], predictions[-1].detach()
    divergence = F.kl_div(students, teacher.expand_as(students), reduction="none", log_target=True)
    return F.pad(divergence.sum(-1).mean(-1), (0, 1))


def check_weights(weights: Sequence[float] | None, nesting_list: Sequence[int]) -> tuple[float, ...]:
    """Return the relative importance c_m of each prefix as a tuple; 1 each when ``weights`` is None."""
    if weights is None:
        return (1.0,) * len(nesting_list)
    if len(weights) != len(nesting_list):
        given, dims = f"{len(weights)} loss weights (head.weights) {list(weights)}", f"{len(nesting_list)} prefix dims"
        raise UserError(f"{given} for {dims} {list(nesting_list)}; give one per dim")
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise UserError(f"loss weights {list(weights)} must be finite, 0 or more, and not all 0")
    return tuple(float(weight) for weight in weights)


class MatryoshkaLoss(nn.Module):
    """Sum any loss on embeddings over their prefixes: ``sum_m c_m loss_fn(z1[:, :m], z2[:, :m], ..., **rest)``.

    Called as ``loss(*embeddings, **rest)``. Every positional argument is an embedding ``(B, D)`` and is cut to each
    prefix: one for a classification loss, two for pairs, three for triplets. Everything else (labels, soft labels,
    a temperature) goes by keyword and reaches ``loss_fn`` unchanged, so that a matrix of soft labels is never cut by
    mistake. A loss on unit vectors must normalize its inputs itself, so that each prefix is normalized separately.

    Args:
        loss_fn: Returns a scalar from embeddings ``(B, m)`` and the keyword arguments.
        nesting_list: Prefix dims, strictly ascending.
        weights: Relative importance c_m of each dim; 1 each when None.
    """

    weights: Tensor

    def __init__(
        self, loss_fn: Callable[..., Tensor], nesting_list: Sequence[int], weights: Sequence[float] | None = None
    ):
        super().__init__()
        self.loss_fn = loss_fn
        self.nesting_list = check_nesting_list(nesting_list)
        self.register_buffer("weights", torch.tensor(check_weights(weights, nesting_list)), persistent=False)

    def forward(self, *embeddings: Tensor, **rest: Any) -> Tensor:
        """Return the weighted sum over prefixes, a scalar on the embeddings' device."""
        widths = {z.shape[1] if z.ndim == 2 and z.is_floating_point() else 0 for z in embeddings}
        if len(widths) != 1 or min(widths) < self.nesting_list[-1]:
            shapes = ", ".join(f"{tuple(z.shape)} {z.dtype}" for z in embeddings) or "nothing"
            raise UserError(
                f"MatryoshkaLoss got {shapes}; positional arguments are embeddings, float tensors (B, D) of one width "
                f"D >= {self.nesting_list[-1]}; pass labels and everything else by keyword"
            )
        losses = [self.loss_fn(*(prefix(z, dim) for z in embeddings), **rest) for dim in self.nesting_list]
        # The weights follow the embeddings, even if nobody moved this module to their device.
        return (torch.stack(losses) * self.weights.to(losses[0])).sum()
