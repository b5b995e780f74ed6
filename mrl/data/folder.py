"""Folders of images, one folder a class, decoded as needed by worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF

from mrl.data.crops import Transform, normalise
from mrl.data.order import Rows
from mrl.errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff"}


def list_images(root: Path, split: str) -> tuple[list[str], Tensor, list[str], int]:
    """Paths, labels ``(N,)`` int64, class names in sorted order, and how many other files were passed over.

    Raises:
        UserError: The split or its class folders are missing, or a class has no image.
    """
    folder = root / split
    if not folder.is_dir():
        found = sorted(path.name for path in root.iterdir()) if root.is_dir() else None
        there = f"there is {', '.join(found[:8]) or 'nothing'}" if found is not None else f"{root} does not exist"
        raise UserError(f"data.root {root} has no folder {split}/ with a folder of images per class ({there})")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} holds no class folders; put the images of each class into a folder of its own")
    paths: list[str] = []
    labels: list[int] = []
    others = 0
    for label, name in enumerate(classes):
        files = sorted(entry.path for entry in os.scandir(folder / name) if not entry.name.startswith("."))
        images = [path for path in files if os.path.splitext(path)[1].lower() in EXTENSIONS]
        if not images:
            raise UserError(f"class {name} has no images in {folder / name} ({len(files)} other files)")
        others += len(files) - len(images)
        paths += images
        labels += [label] * len(images)
    return paths, torch.tensor(labels, dtype=torch.int64), classes, others


def read_image(path: str) -> Tensor:
    """An image file as uint8 ``(3, H, W)``.

    Raises:
        UserError: It cannot be read as an image; the message names the path.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        try:
            image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            if image.ndim == 3 and image.shape[0] == 3:
                return image
        except (RuntimeError, ValueError):
            pass  # CMYK JPEGs, TIFF, BMP and the like: PIL knows more kinds
        with Image.open(path) as opened:
            return TF.pil_to_tensor(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def resize_and_crop(image: Tensor, resize_px: int, crop_px: int) -> Tensor:
    """The centre square ``(3, crop_px, crop_px)`` of an image whose shorter side is brought to ``resize_px``."""
    if min(image.shape[1:]) != resize_px:
        image = TF.resize(image, [resize_px], antialias=True)
    return TF.center_crop(image, [crop_px, crop_px])


class _Batches(Dataset):
    """Item ``i`` is the whole i-th batch, uint8, or the sentence that says which image could not be read."""

    def __init__(self, paths: list[str], transform: Transform, rows: Sequence[Rows]):
        self.paths, self.transform, self.rows = paths, transform, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor | str, Rows]:
        try:
            return torch.stack([self.image(int(row)) for row in self.rows[i]]), self.rows[i]
        except UserError as error:  # a worker's exception would arrive inside a traceback
            return str(error), self.rows[i]

    def image(self, row: int) -> Tensor:
        raise AssertionError("a subclass crops")


class _TrainBatches(_Batches):
    def __init__(self, paths: list[str], transform: Transform, rows: Sequence[Rows], epoch: int, px: int):
        super().__init__(paths, transform, rows)
        self.epoch, self.px = epoch, px

    def image(self, row: int) -> Tensor:
        image = read_image(self.paths[row])
        height, width = (np.array([side]) for side in image.shape[1:])
        boxes, flipped = self.transform.train_boxes(self.epoch, np.array([row]), height, width)
        cropped = TF.resized_crop(image, *boxes[0].tolist(), size=[self.px, self.px], antialias=True)
        return cropped.flip(2) if flipped[0] else cropped


class _EvalBatches(_Batches):
    def image(self, row: int) -> Tensor:
        image = read_image(self.paths[row])
        return resize_and_crop(image, self.transform.eval_resize_px, self.transform.eval_px)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


class FolderImages:
    """Image files and labels ``(N,)`` int64; ``num_workers`` processes decode and crop, one batch each at a time."""

    def __init__(
        self,
        paths: list[str],
        labels: Tensor,
        classes: Sequence[str],
        transform: Transform,
        device: torch.device,
        num_workers: int,
    ):
        self.paths = paths
        self.labels = labels
        self.classes = list(classes)
        self.transform = transform
        self.device = device
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.paths)

    def _load(self, batches: _Batches) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=min(self.num_workers, len(batches)),
            worker_init_fn=_one_thread,
            pin_memory=self.device.type == "cuda",
        )
        for images, rows in loader:
            if isinstance(images, str):
                raise UserError(images)
            images = images.to(self.device, non_blocking=True)
            yield (
                normalise(images, self.transform.mean, self.transform.std),
                self.labels[torch.as_tensor(rows)].to(self.device, non_blocking=True),
            )

    def train_batches(self, rows: Sequence[Rows], epoch: int, px: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of random crops of side ``px``, the same for a sample wherever it is computed."""
        return self._load(_TrainBatches(self.paths, self.transform, rows, epoch, px))

    def eval_batches(self, rows: Sequence[Rows], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of centre crops; all mirrored if ``flip``."""
        for images, labels in self._load(_EvalBatches(self.paths, self.transform, rows)):
            yield (images.flip(3) if flip else images), labels
