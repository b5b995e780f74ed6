"""Small sets: every image decoded once and kept on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from mrl.data.crops import Transform, crop_and_resize, normalise
from mrl.data.order import Rows


class MemoryImages:
    """Images ``(N, 3, S, S)`` uint8 and labels ``(N,)`` int64, cropped in batches on ``device``."""

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], transform: Transform, device: torch.device
    ):
        self.images = images.to(device)
        self.labels = labels.to("cpu", torch.int64)
        self.classes = list(classes)
        self.transform = transform
        self.device = device

    def __len__(self) -> int:
        return len(self.labels)

    def _take(self, rows: Rows) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(np.asarray(rows))
        return self.images[index.to(self.device)].float(), self.labels[index].to(self.device)

    def train_batches(self, rows: Sequence[Rows], epoch: int, px: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of random crops of side ``px``, the same for a sample wherever it is computed."""
        transform = self.transform
        for batch in rows:
            images, labels = self._take(batch)
            heights = np.full(len(batch), images.shape[2])
            boxes, flipped = transform.train_boxes(epoch, batch, heights, heights)
            yield normalise(crop_and_resize(images, boxes, flipped, px), transform.mean, transform.std), labels

    def eval_batches(self, rows: Sequence[Rows], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of centre crops; all mirrored if ``flip``."""
        transform = self.transform
        for batch in rows:
            images, labels = self._take(batch)
            if images.shape[-1] != transform.eval_resize_px:
                images = TF.resize(images, [transform.eval_resize_px] * 2, antialias=True)
            images = TF.center_crop(images, [transform.eval_px] * 2)
            images = images.flip(3) if flip else images
            yield normalise(images, transform.mean, transform.std), labels
