"""Augmentation of whole batches (random erasing, mixup, cutmix), and the seed of each step."""

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
    """Seed all generators, so that a step (erasing, mixup, dropout) depends on seed, step and rank alone."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - timm's mixup draws from numpy's global generator
    random.seed(number)  # and its random erasing from Python's


def make_augmentation(
    data: DataConfig, micro_batch_size: int, num_classes: int, device: torch.device
) -> BatchTransform:
    """Return a function ``(images, labels) -> (images, targets)``: timm's random erasing, then its mixup or cutmix.

    Targets are the labels, or with mixup and cutmix ``(B, C)`` probabilities without label smoothing.
    """
    erase = RandomErasing(data.random_erasing, mode="pixel", device=device) if data.random_erasing > 0 else None
    mixup = None
    if data.mixup > 0 or data.cutmix > 0:
        if micro_batch_size % 2:
            raise UserError(
                f"data.mixup and data.cutmix need an even number of images per micro-batch; it is {micro_batch_size}: "
                "data.batch_size must be a multiple of 2 x processes x train.accumulation_steps"
            )
        mixup = Mixup(data.mixup, data.cutmix, label_smoothing=0.0, num_classes=num_classes)

    def augment(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = erase(images) if erase else images
        return mixup(images, labels) if mixup else (images, labels)

    return augment
