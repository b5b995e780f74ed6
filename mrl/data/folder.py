"""Folders of images, one folder per class, decoded as needed in worker processes."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

from mrl.data.images import Images, LoadBatch
from mrl.data.transforms import Transform, resize_and_center_crop
from mrl.errors import UserError
from mrl.model import ModelInfo
from mrl.progress import progress

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_SHOWN = 5


class ImageList(NamedTuple):
    """The image files of a split, by class, then by path."""

    paths: list[str]
    labels: Tensor  # (N,) int64, positions in classes
    classes: list[str]  # names of the class folders, sorted
    num_ignored: int  # files that are not images by their extension


def list_images(root: str | Path, split: str, show_progress: bool = False) -> ImageList:
    """List the images below ``root/split/<class>/`` at any depth, without hidden files and folders.

    Raises:
        UserError: The root, the split, its class folders or the images of a class are missing.
    """
    top = split_folder(root, split)
    _, classes, files = next(walk(top))
    if not classes:
        raise UserError(f"{top} has no class folders, only {shown(files)}; put the images into {top}/<class>/")
    paths, labels, num_files = [], [], 0
    for label, name in enumerate(progress(classes, show=show_progress, desc=f"list {split}", unit="class")):
        files = list_files(top / name)
        images = [f"{top}/{name}/{file}" for file in files if is_image(file)]
        if not images:
            raise UserError(f"class folder {top / name} has no images; allowed: {' '.join(IMAGE_EXTENSIONS)}")
        paths += images
        labels += [label] * len(images)
        num_files += len(files)
    return ImageList(paths, torch.tensor(labels), classes, num_files - len(paths))


def split_folder(root: str | Path, split: str) -> Path:
    """Return the folder ``root/split``, which must exist."""
    folder = Path(root) / split
    if not Path(root).is_dir():
        raise UserError(f"data.root is {str(root)!r}, which is not a folder; allowed: a folder that holds {split}/")
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; {root} holds {shown(sorted(os.listdir(root)))}")
    return folder


def find_images(folder: str | Path, show_progress: bool = False) -> list[str]:
    """Return the image files below ``folder`` at any depth, as paths relative to it; see `list_files`."""
    return [file for file in list_files(folder, show_progress) if is_image(file)]


def list_files(folder: str | Path, show_progress: bool = False) -> list[str]:
    """Return the files below ``folder`` at any depth, as paths relative to it, in the order of `walk`."""
    start = len(str(folder)) + 1
    folders = progress(walk(folder), show=show_progress, desc=f"list {folder}", unit="folder")
    return [os.path.join(below[start:], name) for below, _, files in folders for name in files]


def walk(top: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a tree as os.walk does, in sorted order, without hidden files and folders; follow links."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error

    for folder, below, files in os.walk(str(top), onerror=fail, followlinks=True):
        below[:] = sorted(name for name in below if name[0] != ".")
        yield folder, below, sorted(name for name in files if name[0] != ".")


def is_image(name: str) -> bool:
    """Whether a file is an image by its extension."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def shown(names: Sequence[str]) -> str:
    """Return the first few names as a sentence lists them."""
    more = f" and {len(names) - MAX_SHOWN:,} more" if len(names) > MAX_SHOWN else ""
    return (", ".join(names[:MAX_SHOWN]) or "nothing") + more


def read_image(path: str) -> Tensor:
    """Read an image as ``(3, H, W)`` uint8: gray is repeated, transparency dropped, EXIF rotation not applied.

    Raises:
        UserError: The file cannot be read as an image.
    """
    try:
        image = decode_image(path, ImageReadMode.RGB)
        if image.dtype == torch.uint16:
            return (image.to(torch.int32) >> 8).to(torch.uint8)
        if image.shape[0] == 3 and image.ndim == 3:
            return image
    except (RuntimeError, ValueError):
        pass  # PIL reads more formats than torchvision and has clearer messages
    try:
        with Image.open(path) as opened:
            return functional.pil_to_tensor(opened.convert("RGB"))
    except Exception as error:  # PIL's decoders raise errors of many kinds on bad data
        raise UserError(f"{path} cannot be read as an image: {str(error) or type(error).__name__}") from error


class FolderImages(Images):
    """A split whose images are read from their files as needed, by ``num_workers`` processes (0: by this one)."""

    def __init__(self, images: ImageList, transform: Transform, device: torch.device, num_workers: int):
        super().__init__(images.labels, images.classes, transform, device)
        self._num_workers = num_workers
        # One array of bytes: with a list, workers would copy a million strings by counting references to them.
        self._paths = np.array([os.fsencode(path) for path in images.paths])

    def _content(self) -> bytes:
        paths = [os.fsdecode(path) for path in self._paths]
        folder = len(os.path.commonpath(paths))
        return b"".join(os.fsencode(f"{path[folder:]} {os.path.getsize(path)}\n") for path in paths)

    def _train_crop(self, index: int, epoch: int, px: int) -> Tensor:
        image = read_image(os.fsdecode(self._paths[index]))
        [box], [mirror] = self.transform.train_boxes(epoch, np.array([index]), np.array([image.shape[1:]]))
        crop = functional.resized_crop(image, *box.tolist(), size=[px, px], antialias=True)
        return self.transform.augment(crop.flip(2) if mirror else crop, epoch, index)

    def _train_crops(self, indices: np.ndarray, epoch: int, px: int) -> Tensor:
        return torch.stack([self._train_crop(index, epoch, px) for index in indices.tolist()])

    def _center_crops(self, indices: np.ndarray) -> Tensor:
        px = self.transform.eval_resize_px, self.transform.eval_px
        return torch.stack([resize_and_center_crop(read_image(os.fsdecode(p)), *px) for p in self._paths[indices]])

    def _load_all(self, load: LoadBatch, indices: Sequence[np.ndarray]) -> Iterator[Tensor]:
        loader: DataLoader = DataLoader(
            indices,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=partial(_load_or_explain, load),
            num_workers=min(self._num_workers, len(indices)),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else each pass would draw from the global one
        )
        with _stop_signals_blocked():
            batches = iter(loader)
        for images in batches:
            if isinstance(images, str):
                del batches  # the traceback keeps this frame, which would keep the workers
                raise UserError(images)
            yield images


def _load_or_explain(load: LoadBatch, indices: np.ndarray) -> Tensor | str:
    """Return a batch, or the message of a UserError: raised in a worker, it would arrive wrapped in a traceback."""
    try:
        return load(indices)
    except UserError as error:
        return str(error)


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Delay stop signals; workers started meanwhile inherit that until they ignore them."""
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
    for number in _STOP_SIGNALS:  # Ctrl-C reaches the whole process group, but the main process ends its workers
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Kill workers of an unfinished pass: at exit, multiprocessing would send them SIGTERM and wait forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch reports that its workers were killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


atexit.register(_end_workers)  # after multiprocessing's own handler, so that it runs before


def evaluated_images(paths: Sequence[str], info: ModelInfo, device: torch.device, num_workers: int) -> FolderImages:
    """Return image files without labels, resized, cropped and normalized as the model expects."""
    transform = Transform(0, (1, 1), (1, 1), False, info.resize_px, info.crop_px, info.mean, info.std)
    images = ImageList(list(paths), torch.zeros(len(paths), dtype=torch.int64), [], 0)
    return FolderImages(images, transform, device, num_workers)
