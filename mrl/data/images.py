"""What all backends have in common: the batch contract, and a thread pool that works ahead."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mrl.data.transforms import Transform, normalize

LoadBatch = Callable[[np.ndarray], Any]


class EvalImages(Protocol):
    """What an evaluation reads: the images of a split, or what takes their place."""

    labels: Tensor

    def __len__(self) -> int: ...

    def eval_batches(self, indices: Sequence[np.ndarray], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images, labels)`` for each array of indices; ``flip`` mirrors all images."""


class Images(ABC):
    """The images of a split.

    A batch is ``(images, labels)``: ``(B, 3, H, W)`` float32, normalized, channels_last, and ``(B,)`` int64, both on
    ``device``. `mrl.data.transforms` chooses the indices of each batch.
    """

    def __init__(self, labels: Tensor, classes: Sequence[str], transform: Transform, device: torch.device):
        self.labels, self.classes = labels, list(classes)  # (N,) int64 positions in the class names
        self.transform, self.device = transform, device
        self.unreadable: list[str] = []  # why images were left out, one sentence each
        self.held_out: list[str] | None = None  # which images of the training set these are, as paths below data.root

    def __len__(self) -> int:
        return len(self.labels)

    def train_batches(self, indices: Sequence[np.ndarray], epoch: int, px: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch of random ``px`` x ``px`` crops for each array of indices."""
        return self._batches(indices, partial(self._train_crops, epoch=epoch, px=px), flip=False)

    def eval_batches(self, indices: Sequence[np.ndarray], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch of center crops for each array of indices; ``flip`` mirrors all of them."""
        return self._batches(indices, self._center_crops, flip)

    def _batches(self, indices: Sequence[np.ndarray], load: LoadBatch, flip: bool) -> Iterator[tuple[Tensor, Tensor]]:
        indices = [np.asarray(batch) for batch in indices]
        for batch, images in zip(indices, self._load_all(load, indices), strict=True):
            images = images.to(self.device, non_blocking=True)
            images = images.flip(3) if flip else images
            labels = self.labels[torch.from_numpy(batch)].to(self.device, non_blocking=True)
            yield normalize(images, self.transform.mean, self.transform.std), labels

    def _load_all(self, load: LoadBatch, indices: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Yield ``load(batch)`` for each batch of indices."""
        return map(load, indices)

    def sha256(self) -> str:
        """Return a hash of labels, class names, and images or their files."""
        digest = hashlib.sha256(json.dumps(self.classes).encode() + self.labels.numpy().tobytes())
        digest.update(self._content())
        return digest.hexdigest()

    @abstractmethod
    def _content(self) -> bytes:
        """Return what tells these images from others."""

    @abstractmethod
    def _train_crops(self, indices: np.ndarray, epoch: int, px: int) -> Tensor:
        """Return ``(B, 3, px, px)`` pixels from 0 to 255."""

    @abstractmethod
    def _center_crops(self, indices: np.ndarray) -> Tensor:
        """Return ``(B, 3, eval_px, eval_px)`` pixels from 0 to 255."""


def map_ahead(function: Callable[[Any], Any], items: Iterable[Any], num_threads: int) -> Iterator[Any]:
    """Yield ``function(item)`` in order, while threads work on the next ``2 * num_threads`` items.

    The threads are daemons, so that one that waits for a disk does not keep an interrupted process.
    """
    pool = ThreadPool(num_threads)
    started: deque[AsyncResult] = deque()
    try:
        for item in items:
            started.append(pool.apply_async(function, (item,)))
            if len(started) > 2 * num_threads:
                yield started.popleft().get()
        while started:
            yield started.popleft().get()
    finally:
        pool.terminate()


def default_workers(device: torch.device) -> int:
    """Return how many processes decode images: all cores feed a GPU; a CPU computes with three quarters of them.

    None on fewer than 4 cores: on two, one process beside one thread embedded 0.6 times as fast (docs/SPEED.md).
    """
    cores = cores_per_process()
    return cores if device.type != "cpu" else cores // 4


def cores_per_process() -> int:
    """Return this process's share of the machine's CPU cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def threads_beside(num_workers: int) -> Iterator[None]:
    """Leave the cores of ``num_workers`` decoding processes to them: torch has fewer threads meanwhile."""
    before, set_threads = torch.get_num_threads(), torch.set_num_threads  # a pass may end after torch's module is gone
    set_threads(min(before, max(1, cores_per_process() - num_workers)))
    try:
        yield
    finally:
        set_threads(before)
