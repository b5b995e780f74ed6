"""Folders of images, one folder per class, decoded as needed by worker processes."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

from mrl.data.crops import Transform, normalise, resize_and_centre_crop
from mrl.errors import UserError


def read_image(path: str) -> Tensor:
    """The image in a file, ``(3, H, W)`` uint8; grey is repeated, transparency left out, EXIF rotation not applied.

    Raises:
        UserError: The file cannot be read as an image; the message names it.
    """
    try:
        image = decode_image(path, ImageReadMode.RGB)
        if image.dtype == torch.uint16:
            return (image.to(torch.int32) >> 8).to(torch.uint8)
        if image.shape[0] == 3 and image.ndim == 3:
            return image
    except (RuntimeError, ValueError):
        pass  # PIL reads more formats than torchvision, and says better what is wrong with a file
    try:
        with Image.open(path) as opened:
            return functional.pil_to_tensor(opened.convert("RGB"))
    except Exception as error:  # PIL's decoders raise errors of many kinds on bad data
        raise UserError(f"{path} cannot be read as an image: {str(error) or type(error).__name__}") from error


def load_crop(paths: np.ndarray, transform: Transform, epoch: int, px: int, row: int) -> Tensor:
    """One image as it is trained on, ``(3, px, px)`` uint8."""
    image = read_image(os.fsdecode(paths[row]))
    _, height, width = image.shape
    boxes, flipped = transform.train_boxes(epoch, np.array([row]), np.array([height]), np.array([width]))
    crop = functional.resized_crop(image, *boxes[0].tolist(), size=[px, px], antialias=True)
    crop = functional.horizontal_flip(crop) if flipped[0] else crop
    return transform.augmented(crop, epoch, row)


def load_centre(paths: np.ndarray, transform: Transform, row: int) -> Tensor:
    """One image as it is evaluated, ``(3, eval_px, eval_px)`` uint8."""
    return resize_and_centre_crop(read_image(os.fsdecode(paths[row])), transform.eval_resize_px, transform.eval_px)


class FolderImages:
    """A split whose images are read from files as needed; for sets of any size.

    Args:
        paths: N image files.
        labels: ``(N,)`` int64.
        classes: Names of the classes.
        transform: Crops and normalisation.
        device: Where batches are wanted.
        num_workers: Processes that decode; 0 decodes in this one.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        classes: Sequence[str],
        transform: Transform,
        device: torch.device,
        num_workers: int,
    ):
        self.labels = labels
        self.classes = list(classes)
        self._transform = transform
        self._device = device
        self._num_workers = num_workers
        # One array of bytes: worker processes would copy a list of a million strings by counting references to them.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self.labels)

    def train_batches(self, rows: Sequence[np.ndarray], epoch: int, px: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random crops of side ``px`` for each array of rows, cut from the whole image.

        Raises:
            UserError: An image cannot be read.
        """
        return self._batches(rows, partial(load_crop, self._paths, self._transform, epoch, px), flip=False)

    def eval_batches(self, rows: Sequence[np.ndarray], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Centre crops for each array of rows; ``flip`` mirrors every one.

        Raises:
            UserError: An image cannot be read.
        """
        return self._batches(rows, partial(load_centre, self._paths, self._transform), flip)

    def _batches(
        self, rows: Sequence[np.ndarray], load: Callable[[int], Tensor], flip: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Batches(rows, load),
            batch_size=None,
            num_workers=min(self._num_workers, len(rows)),
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else each pass would draw from the global one
        )
        # No name for the started workers: a traceback that keeps this frame would keep them alive.
        for batch_rows, images in zip(rows, _start(loader), strict=True):
            if isinstance(images, str):
                raise UserError(images)
            on_device = images.to(self._device, non_blocking=True)
            on_device = functional.horizontal_flip(on_device) if flip else on_device
            labels = self.labels[torch.as_tensor(batch_rows)].to(self._device, non_blocking=True)
            yield normalise(on_device, self._transform.mean, self._transform.std), labels


class _Batches(Dataset[Tensor | str]):
    """Item i is the i-th batch, ``(B, 3, H, W)`` uint8, or the message of the error that prevented it.

    A message, because an error raised in a worker arrives wrapped in the worker's traceback.
    """

    def __init__(self, rows: Sequence[np.ndarray], load: Callable[[int], Tensor]):
        self.rows = rows
        self.load = load

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return torch.stack([self.load(int(row)) for row in self.rows[index]])
        except UserError as error:
            return str(error)


def _start(loader: DataLoader) -> Iterator[Tensor | str]:
    """Batches of ``loader``, its workers started out of reach of stop signals, which each then ignores for itself."""
    with _stop_signals_held():
        return iter(loader)


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _stop_signals_held() -> Iterator[None]:
    """A stop signal that comes meanwhile waits; processes started meanwhile inherit that until they say otherwise."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # A stop signal goes to the whole process group; the main process decides when its workers end. One that came
    # while this worker was starting was held, and is dropped here.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """End workers that an unfinished pass has left: multiprocessing would send them SIGTERM and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch reports that its workers were killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


atexit.register(_end_workers)  # after multiprocessing's own, so that it runs before
