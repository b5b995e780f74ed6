"""Schedules as pure functions of the step or epoch: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal


def lr_at(
    step: int, total_steps: int, warmup_steps: float, peak: float, schedule: Literal["linear", "cosine"] = "linear"
) -> float:
    """The learning rate of optimizer step ``step`` (0 is the first): up in a line to ``peak``, then down towards 0.

    >>> [lr_at(step, total_steps=6, warmup_steps=2, peak=1.0) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    remaining = (total_steps - step) / (total_steps - warmup_steps)
    if schedule == "linear":
        return peak * remaining
    return peak * 0.5 * (1 - math.cos(math.pi * remaining))


def px_at(epoch: int, train_px: int | Sequence[tuple[int, int]]) -> int:
    """The side of training images in pixels during ``epoch``.

    >>> [px_at(epoch, [(0, 160), (32, 192)]) for epoch in (0, 31, 32, 39)]
    [160, 160, 192, 192]
    """
    if isinstance(train_px, int):
        return train_px
    return [px for first_epoch, px in train_px if first_epoch <= epoch][-1]
