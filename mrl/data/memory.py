"""Small sets, decoded once, kept on the device and cropped there in batches; scikit-learn's digits are one."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from mrl.data.folder import ImageList, decode
from mrl.data.images import Images, cores_per_process, map_ahead
from mrl.data.transforms import Transform, crop_and_resize, resize_and_center_crop
from mrl.errors import UserError
from mrl.progress import progress

IMAGES_PER_TASK = 64
DIGIT_CLASSES = [str(digit) for digit in range(10)]


class MemoryImages(Images):
    """A split whose images ``(N, 3, S, S)`` uint8, S = ``transform.eval_resize_px``, are kept on ``device``."""

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], transform: Transform, device: torch.device
    ):
        super().__init__(labels, classes, transform, device)
        self._images = images.to(device)
        self.num_bytes = images.nbytes

    def _take(self, indices: np.ndarray) -> Tensor:
        return self._images[torch.from_numpy(indices).to(self.device, non_blocking=True)]

    def _content(self) -> bytes:
        return self._images.cpu().numpy().tobytes()

    def _train_crops(self, indices: np.ndarray, epoch: int, px: int) -> Tensor:
        images = self._take(indices)
        boxes, flipped = self.transform.train_boxes(epoch, indices, np.full((len(indices), 2), images.shape[-1]))
        return crop_and_resize(images.float(), boxes, flipped, px)

    def _center_crops(self, indices: np.ndarray) -> Tensor:
        return functional.center_crop(self._take(indices), [self.transform.eval_px])


def read_into_memory(
    found: ImageList, transform: Transform, device: torch.device, split: str, show_progress: bool, way_out: str
) -> MemoryImages:
    """Return image files as a split in memory: the shorter side resized, the center cut out; ``way_out`` is advice."""
    px = transform.eval_resize_px
    images = torch.empty(len(found.paths), 3, px, px, dtype=torch.uint8)

    def decode_some(some: range) -> int:
        for index in some:
            image = decode(found.paths[index], transform.exif_rotation)
            images[index] = resize_and_center_crop(image, px, px, transform.interpolation)
        return len(some)

    whole = range(len(images))
    tasks = [whole[start : start + IMAGES_PER_TASK] for start in whole[::IMAGES_PER_TASK]]
    try:
        with progress(show=show_progress, total=len(images), desc=f"decode {split}", unit="image") as bar:
            for done in map_ahead(decode_some, tasks, cores_per_process()):
                bar.update(done)
    except UserError as error:
        raise UserError(f"{error}; {way_out}") from error
    return MemoryImages(images, found.labels, found.classes, transform, device)


def check_memory(num_images: int, px: int, device: torch.device) -> None:
    """Refuse to keep images of ``px`` x ``px`` pixels that do not fit in memory."""
    needed = num_images * 3 * px * px
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = {"memory per process": total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
    if device.type == "cuda":
        room["free GPU memory"] = torch.cuda.mem_get_info(device)[0]
    for where, available in room.items():
        if needed > available:
            raise UserError(
                f"data.backend memory needs {needed / 2**30:,.1f} GiB for {num_images:,} images of {px} px, "
                f"but there are {available / 2**30:,.1f} GiB of {where}; use data.backend folder"
            )


def load_digits(px: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return splits train and val of 1,797 digits: images ``(N, 3, px, px)`` uint8, labels ``(N,)`` int64.

    Every fifth image of each class, in the order of the set, is in val.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    gray = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = functional.resize(gray, [px, px], antialias=True).round().to(torch.uint8).repeat(1, 3, 1, 1)
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_val[(labels == digit).nonzero()[4::5]] = True
    return {"train": (images[~is_val], labels[~is_val]), "val": (images[is_val], labels[is_val])}
