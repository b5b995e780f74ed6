"""Losses over prefixes (paper, equation 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl.errors import UserError
from mrl.nesting import check_nesting_list, prefix


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
    by keyword. Where the loss works on unit vectors it must normalise what it is given, so that
    each prefix is normalised separately (as the paper does for ALIGN).

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
