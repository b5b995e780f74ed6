"""The optimizer and its parameter groups."""

from __future__ import annotations

from typing import Literal

import torch
from timm.optim import param_groups_weight_decay

from mrl.models import MatryoshkaClassifier


def build_optimizer(
    model: MatryoshkaClassifier, name: Literal["sgd", "adamw"], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with momentum (not Nesterov) or AdamW over the trainable parameters.

    Weight decay reaches parameters with more than one dimension only: no bias and no norm, whatever
    its name, nor what the backbone itself exempts (a ViT's class token and position embedding).
    """
    exempt: set[str] = getattr(model.backbone, "no_weight_decay", set)()
    groups = param_groups_weight_decay(
        model, weight_decay, no_weight_decay_list=[f"backbone.{parameter}" for parameter in exempt]
    )
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    return torch.optim.AdamW(groups, lr=lr)
