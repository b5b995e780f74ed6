"""timm's RandAugment, made a pure function of the sample."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator

import numpy as np
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import functional

from mrl.data.order import AUGMENT_STREAM, counter_hash


def rand_augment(
    image: Tensor, words: str, mean: tuple[float, float, float], seed: int, epoch: int, row: int
) -> Tensor:
    """``image`` ``(3, px, px)`` uint8 after RandAugment as ``words`` describe it, a function of (seed, epoch, row).

    Args:
        image: A crop.
        words: As `mrl.config.DataConfig.rand_augment`.
        mean: Red, green, blue from 0 to 1 of pixels that come in from outside the image.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        row: Image number.
    """
    augment = _augment(words, image.shape[-1], mean)
    with _global_generators(int(counter_hash(AUGMENT_STREAM, seed, epoch, row)[0])):
        augmented = augment(functional.to_pil_image(image))
    return functional.pil_to_tensor(augmented)


@functools.lru_cache
def _augment(words: str, px: int, mean: tuple[float, float, float]) -> RandAugment:
    fill = tuple(round(255 * channel) for channel in mean)
    augment = rand_augment_transform(words, {"translate_const": int(0.45 * px), "img_mean": fill})
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """``image`` with the highest ``bits`` of each channel kept; timm goes down to 0, which Pillow refuses."""
    return image.point(lambda value: value & ~(2 ** (8 - bits) - 1) & 255) if bits < 8 else image


@contextlib.contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators, which timm draws from, seeded meanwhile and then as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
