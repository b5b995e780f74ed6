"""Folders of images, one folder per class, decoded as needed by worker processes."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

from mrl.data.crops import Transform, normalise, resize_and_centre_crop
from mrl.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_SHOWN = 5


class ImageList(NamedTuple):
    """The images of a split.

    Attributes:
        paths: N files, by class, then by path.
        labels: ``(N,)`` int64, positions in ``classes``.
        classes: Names of the class folders, sorted.
        num_ignored: Files inside class folders that are no images by their extension.
    """

    paths: list[str]
    labels: Tensor
    classes: list[str]
    num_ignored: int


def list_images(root: str | Path, split: str) -> ImageList:
    """The images below ``root/split/<class>/``, at any depth; hidden files and folders do not count.

    Raises:
        UserError: The root, the split, its class folders or the images of a class are missing.
    """
    folder = Path(root) / split
    if not Path(root).is_dir():
        raise UserError(f"data.root is {str(root)!r}, which is not a folder; allowed: a folder that holds {split}/")
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; {root} holds {shown(sorted(os.listdir(root)))}")
    entries = sorted((entry for entry in os.scandir(folder) if entry.name[0] != "."), key=lambda entry: entry.name)
    classes = [entry.name for entry in entries if entry.is_dir()]
    if not classes:
        raise UserError(
            f"{folder} holds no class folders but {shown([entry.name for entry in entries])}; "
            f"put the images into {folder}/<class>/"
        )
    paths: list[str] = []
    counts: list[int] = []
    num_ignored = 0
    for name in classes:
        files = list(files_below(folder / name))
        found = [path for path in files if path.lower().endswith(IMAGE_EXTENSIONS)]
        if not found:
            raise UserError(f"class folder {folder / name} holds no images; allowed: {' '.join(IMAGE_EXTENSIONS)}")
        paths += found
        counts.append(len(found))
        num_ignored += len(files) - len(found)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return ImageList(paths, labels, classes, num_ignored)


def shown(names: Sequence[str]) -> str:
    """The first few names, as a sentence lists them."""
    more = f" and {len(names) - MAX_SHOWN:,} more" if len(names) > MAX_SHOWN else ""
    return (", ".join(names[:MAX_SHOWN]) or "nothing") + more


def files_below(folder: Path) -> Iterator[str]:
    """Files at any depth, by path; hidden files and folders do not count."""
    for directory, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        yield from (os.path.join(directory, name) for name in sorted(files) if name[0] != ".")


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
    return functional.horizontal_flip(crop) if flipped[0] else crop


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
        with _stop_signals_held():
            batches = iter(loader)  # starts the workers
        for batch_rows, images in zip(rows, batches, strict=True):
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
