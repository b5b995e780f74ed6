"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that come with the package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

VAL_EVERY = 5
DIGIT_CLASSES = tuple(str(digit) for digit in range(10))


def load_digits(px: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Splits train and val: images ``(N, 3, px, px)`` uint8, labels ``(N,)`` int64.

    Every fifth image of each class, in the order of the set, is in val.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = functional.resize(grey, [px, px], antialias=True).round().to(torch.uint8).repeat(1, 3, 1, 1)
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_val[(labels == digit).nonzero()[VAL_EVERY - 1 :: VAL_EVERY]] = True
    return {"train": (images[~is_val], labels[~is_val]), "val": (images[is_val], labels[is_val])}
