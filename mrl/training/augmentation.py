"""What is random in a step and works on its batch as a whole: random erasing, mixup and cutmix, and their seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mrl.config import DataConfig
from mrl.errors import UserError

BatchTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make whatever is random in a step (erasing, mixup, dropout, drop path) a function of seed, step and rank.

    So a resumed run has no generator state to restore.
    """
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - timm's mixup draws from numpy's global generator
    random.seed(number)  # and its random erasing from Python's


def make_augmentation(
    data: DataConfig, micro_batch_size: int, num_classes: int, device: torch.device
) -> BatchTransform:
    """``(images, labels) -> (images, targets)``: timm's random erasing, then its mixup or cutmix, as far as asked for.

    Targets are the labels, or with mixup and cutmix ``(B, C)`` probabilities; label smoothing stays in the loss.

    Raises:
        UserError: Images are to be mixed in pairs, but there is an odd number of them.
    """
    erase = RandomErasing(data.random_erasing, mode="pixel", device=device) if data.random_erasing > 0 else None
    mixup = None
    if data.mixup > 0 or data.cutmix > 0:
        if micro_batch_size % 2:
            raise UserError(
                f"data.mixup and data.cutmix pair images, but a micro-batch has {micro_batch_size}, an odd number"
            )
        mixup = Mixup(data.mixup, data.cutmix, label_smoothing=0.0, num_classes=num_classes)

    def augment(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = erase(images) if erase else images
        return mixup(images, labels) if mixup else (images, labels)

    return augment
