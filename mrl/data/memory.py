"""Small sets: every image decoded once and kept on the device, cropped there in batches.

scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that come with the package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from mrl.data.folder import read_image
from mrl.data.transforms import Transform, crop_and_resize, normalize, resize_and_center_crop
from mrl.errors import UserError
from mrl.progress import progress

IMAGES_PER_TASK = 64


class MemoryImages:
    """A split whose images are all in memory, square.

    Args:
        images: ``(N, 3, S, S)`` uint8, S = ``transform.eval_resize_px``.
        labels: ``(N,)`` int64.
        classes: Names of the classes.
        transform: Crops and normalization.
        device: Where the images are kept and batches are wanted.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], transform: Transform, device: torch.device
    ):
        self.labels = labels
        self.classes = list(classes)
        self._images = images.to(device)
        self._transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_bytes(self) -> int:
        """Memory that the images take, in bytes."""
        return self._images.nbytes

    def train_batches(self, rows: Sequence[np.ndarray], epoch: int, px: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random crops of side ``px`` for each array of rows."""
        for batch_rows in map(np.asarray, rows):
            images, labels = self._take(batch_rows)
            sides = np.full(len(batch_rows), images.shape[-1])
            boxes, flipped = self._transform.train_boxes(epoch, batch_rows, sides, sides)
            crops = crop_and_resize(images.float(), boxes, flipped, px)
            yield normalize(crops, self._transform.mean, self._transform.std), labels

    def eval_batches(self, rows: Sequence[np.ndarray], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Center crops for each array of rows; ``flip`` mirrors every one."""
        for batch_rows in map(np.asarray, rows):
            images, labels = self._take(batch_rows)
            centers = functional.center_crop(images, [self._transform.eval_px] * 2)
            centers = functional.horizontal_flip(centers) if flip else centers
            yield normalize(centers, self._transform.mean, self._transform.std), labels

    def _take(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(rows)
        device = self._images.device
        wanted = index.to(device, non_blocking=True)
        return self._images[wanted], self.labels[index].to(device, non_blocking=True)


def decode_images(paths: Sequence[str], px: int, num_threads: int, title: str, show_progress: bool) -> Tensor:
    """The images in ``paths``, ``(N, 3, px, px)`` uint8 on the CPU: shorter side resized to ``px``, center cut out.

    Raises:
        UserError: An image cannot be read.
    """
    images = torch.empty(len(paths), 3, px, px, dtype=torch.uint8)

    def decode(start: int) -> int:
        stop = min(start + IMAGES_PER_TASK, len(paths))
        for row in range(start, stop):
            images[row] = resize_and_center_crop(read_image(paths[row]), px, px)
        return stop - start

    with (
        ThreadPoolExecutor(num_threads) as pool,  # decoding releases the interpreter's lock
        progress(show=show_progress, total=len(paths), desc=title, unit="image") as bar,
    ):
        try:
            for done in pool.map(decode, range(0, len(paths), IMAGES_PER_TASK)):
                bar.update(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return images


def check_fits(num_images: int, px: int, device: torch.device) -> None:
    """Nothing, if so many images of so many pixels have room in memory.

    Raises:
        UserError: They have not.
    """
    needed = num_images * 3 * px * px
    room = {}
    if hasattr(os, "sysconf"):  # of which each process of a machine takes its share
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        room["memory per process"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    if device.type == "cuda":
        room["free GPU memory"] = torch.cuda.mem_get_info(device)[0]
    for where, there in room.items():
        if needed > there:
            raise UserError(
                f"data.backend memory needs {needed / 2**30:,.1f} GiB for {num_images:,} images of {px} px, "
                f"but there are {there / 2**30:,.1f} GiB of {where}; use data.backend folder"
            )


VAL_EVERY = 5
DIGIT_CLASSES = tuple(str(digit) for digit in range(10))


def load_digits(px: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Splits train and val: images ``(N, 3, px, px)`` uint8, labels ``(N,)`` int64.

    Every fifth image of each class, in the order of the set, is in val.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    gray = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = functional.resize(gray, [px, px], antialias=True).round().to(torch.uint8).repeat(1, 3, 1, 1)
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_val[(labels == digit).nonzero()[VAL_EVERY - 1 :: VAL_EVERY]] = True
    return {"train": (images[~is_val], labels[~is_val]), "val": (images[is_val], labels[is_val])}
