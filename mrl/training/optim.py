"""The optimizer with its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import logging
import math

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from mrl.model import MatryoshkaClassifier

logging.getLogger("timm.optim._param_groups").setLevel(logging.ERROR)  # it warns about a backbone of one layer


def build_optimizer(
    model: MatryoshkaClassifier, name: str, lr: float, momentum: float, weight_decay: float, layer_decay: float = 1.0
) -> torch.optim.Optimizer:
    """Return SGD with momentum (not Nesterov) or AdamW over the trainable parameters.

    Weight decay applies to parameters with more than one dimension, except those that the backbone exempts (a ViT's
    class token and position embedding). With ``layer_decay`` below 1, each group has an ``lr_scale`` for `set_lr`:
    ``layer_decay`` to the power of its distance from the head. timm defines the layers.
    """
    exempt: set[str] = getattr(model.backbone, "no_weight_decay", set)()
    if layer_decay == 1 or not any(parameter.requires_grad for parameter in model.backbone.parameters()):
        spared = [f"backbone.{name}" for name in exempt]
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)
    else:
        groups = param_groups_layer_decay(model.backbone, weight_decay, exempt, layer_decay=layer_decay)
        for group in groups:  # timm counts from the backbone's last layer, which is one below the head
            group["lr_scale"] *= layer_decay
        groups += param_groups_weight_decay(model.head, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    return torch.optim.AdamW(groups, lr=lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate ``lr`` of this step, scaled in each parameter group by its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def lr_at(step: int, total_steps: int, warmup_steps: float, peak: float, schedule: str = "linear") -> float:
    """Return the learning rate of ``step``, counted from 0: linear warm-up to ``peak``, then down toward 0.

    >>> [lr_at(step, total_steps=6, warmup_steps=2, peak=1.0) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    remaining = (total_steps - step) / (total_steps - warmup_steps)
    return peak * (remaining if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * remaining)))


def shorten_warmup(warmup_epochs: float, epochs: int) -> float:
    """Return ``warmup_epochs``, or half of ``epochs`` if the warm-up would last for all of them."""
    return warmup_epochs if warmup_epochs < epochs else epochs / 2
