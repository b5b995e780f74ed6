"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that need no download."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

VAL_EVERY = 5


def load_digits(px: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Train and val: images ``(N, 3, px, px)`` uint8, labels ``(N,)`` int64; every fifth image of a class is val."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    labels = np.asarray(digits.target, dtype=np.int64)
    rank_in_class = np.zeros_like(labels)
    for label in range(10):
        rank_in_class[labels == label] = np.arange((labels == label).sum())
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = TF.resize(grey, [px, px], antialias=True).round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
    is_val = torch.from_numpy(rank_in_class % VAL_EVERY == VAL_EVERY - 1)
    targets = torch.from_numpy(labels)
    return {"train": (images[~is_val], targets[~is_val]), "val": (images[is_val], targets[is_val])}
