"""The optimizer and its parameter groups."""

from __future__ import annotations

from typing import Literal

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from mrl.models import MatryoshkaClassifier


def build_optimizer(
    model: MatryoshkaClassifier,
    name: Literal["sgd", "adamw"],
    lr: float,
    momentum: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD with momentum (not Nesterov) or AdamW over the trainable parameters.

    Weight decay reaches parameters with more than one dimension only: no bias and no norm, whatever
    its name, nor what the backbone itself exempts (a ViT's class token and position embedding).

    With ``layer_decay`` below 1 each group has an ``lr_scale`` of ``layer_decay`` to the power of its distance
    from the head, which `set_lr` multiplies the learning rate by. What a layer is says the backbone (timm).
    """
    exempt: set[str] = getattr(model.backbone, "no_weight_decay", set)()
    if layer_decay == 1:
        groups = param_groups_weight_decay(
            model, weight_decay, no_weight_decay_list=[f"backbone.{parameter}" for parameter in exempt]
        )
    else:
        groups = param_groups_layer_decay(model.backbone, weight_decay, exempt, layer_decay=layer_decay)
        for group in groups:  # timm counts from the backbone's last layer, which is one below the head
            group["lr_scale"] *= layer_decay
        groups += param_groups_weight_decay(model.head, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    return torch.optim.AdamW(groups, lr=lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group its share of the learning rate ``lr`` of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
