"""The image files of a split, found once: the list is kept, and used again while the folders are the same.

Folders of images, one folder per class, decoded as needed by worker processes.

Images without labels, as a model's evaluation sees them.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
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

from mrl.data.transforms import Transform, normalize, resize_and_center_crop
from mrl.errors import UserError
from mrl.model import ModelInfo
from mrl.progress import progress
from mrl.rundir import atomic_write_text

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_SHOWN = 5
CACHE_FORMAT = 1
SETTLED_SECONDS = 2.0


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


class Folder(NamedTuple):
    """One folder of a tree.

    Attributes:
        path: Below the top of the tree, with "/"; "" is the top itself.
        state: Time of the last change in nanoseconds, and inode. Adding, removing or renaming an entry changes it.
        images: Names of the image files in it, sorted.
        num_others: Other files in it.
    """

    path: str
    state: list[int]
    images: list[str]
    num_others: int


def list_images(root: str | Path, split: str, show_progress: bool = False) -> ImageList:
    """The images below ``root/split/<class>/``, at any depth; hidden files and folders do not count.

    Raises:
        UserError: The root, the split, its class folders or the images of a class are missing.
    """
    return images_by_class(split_folder(root, split), read_tree(split_folder(root, split), show_progress))


def split_folder(root: str | Path, split: str) -> Path:
    """The folder ``root/split``.

    Raises:
        UserError: It is missing.
    """
    folder = Path(root) / split
    if not Path(root).is_dir():
        raise UserError(f"data.root is {str(root)!r}, which is not a folder; allowed: a folder that holds {split}/")
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; {root} holds {shown(sorted(os.listdir(root)))}")
    return folder


def images_by_class(top: Path, tree: Sequence[Folder]) -> ImageList:
    """The images of ``tree``, each of the class that the folder below ``top`` on its path is called.

    Raises:
        UserError: There are no class folders, or no images in one.
    """
    paths: list[str] = []
    counts: dict[str, int] = {}
    num_ignored = 0
    for folder in tree[1:]:
        name = folder.path.split("/", 1)[0]
        counts[name] = counts.get(name, 0) + len(folder.images)
        paths += [f"{top}/{folder.path}/{image}" for image in folder.images]
        num_ignored += folder.num_others
    if not counts:
        names = sorted(entry.name for entry in os.scandir(top) if entry.name[0] != ".")
        raise UserError(f"{top} holds no class folders but {shown(names)}; put the images into {top}/<class>/")
    for name, count in counts.items():
        if count == 0:
            raise UserError(f"class folder {top / name} holds no images; allowed: {' '.join(IMAGE_EXTENSIONS)}")
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts.values())))
    return ImageList(paths, labels, list(counts), num_ignored)


def shown(names: Sequence[str]) -> str:
    """The first few names, as a sentence lists them."""
    more = f" and {len(names) - MAX_SHOWN:,} more" if len(names) > MAX_SHOWN else ""
    return (", ".join(names[:MAX_SHOWN]) or "nothing") + more


def read_tree(top: Path, show_progress: bool = False) -> list[Folder]:
    """The folder ``top`` and all below it, each before its subfolders, in sorted order; from the cache if it holds.

    It holds if no folder has changed since. A folder that was still changing a moment ago is not
    kept, because file systems tell times apart only so far.

    Raises:
        UserError: A folder cannot be read.
    """
    cache = cache_path(top)
    kept = _read_cache(cache, top)
    if kept is not None:
        return kept
    started = time.time()
    tree = list(progress(_walk(top), show=show_progress, desc=f"list {top.name}", unit="folder"))
    if max(folder.state[0] for folder in tree) < (started - SETTLED_SECONDS) * 1e9:
        try:
            _write_cache(cache, tree)
        except (OSError, UserError) as error:
            if show_progress:
                print(f"the list of {top} is not kept for the next start: {error}", file=sys.stderr)
    return tree


def cache_path(top: Path) -> Path:
    """Where the list of ``top`` is kept: below $XDG_CACHE_HOME, by default ~/.cache."""
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, IMAGE_EXTENSIONS, str(top.resolve())]).encode()).hexdigest()
    # An empty or relative value counts as not set, says the specification of that variable.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mrl" / f"images-{key[:32]}.json"


def _state(folder: Path) -> list[int]:
    found = folder.stat()
    return [found.st_mtime_ns, found.st_ino]


def _walk(top: Path) -> Iterator[Folder]:
    waiting = [""]
    while waiting:
        path = waiting.pop()
        folder = top / path
        try:
            state = _state(folder)  # before its entries, so that a change meanwhile is a change
            entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda entry: entry.name)
            is_folder = [entry.is_dir() for entry in entries]
        except OSError as error:
            raise UserError(f"{folder} cannot be listed: {error.strerror}") from error
        files = [entry.name for entry, below in zip(entries, is_folder, strict=True) if not below]
        images = [name for name in files if name.lower().endswith(IMAGE_EXTENSIONS)]
        prefix = f"{path}/" if path else ""
        below = [prefix + entry.name for entry, below in zip(entries, is_folder, strict=True) if below]
        waiting += reversed(below)
        yield Folder(path, state, images, len(files) - len(images))


def _read_cache(cache: Path, top: Path) -> list[Folder] | None:
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, cut short, or of another make
        tree = [Folder(*folder) for folder in json.loads(cache.read_bytes())]
        if tree and all(_state(top / folder.path) == folder.state for folder in tree):
            return tree
    return None


def _write_cache(cache: Path, tree: Sequence[Folder]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Several processes, on several machines even, may write the same list at once: each to a folder of its own first.
    with tempfile.TemporaryDirectory(dir=cache.parent) as own:
        atomic_write_text(Path(own) / cache.name, json.dumps(tree))
        os.replace(Path(own) / cache.name, cache)


def read_image(path: str) -> Tensor:
    """The image in a file, ``(3, H, W)`` uint8; gray is repeated, transparency left out, EXIF rotation not applied.

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


def load_center(paths: np.ndarray, transform: Transform, row: int) -> Tensor:
    """One image as it is evaluated, ``(3, eval_px, eval_px)`` uint8."""
    return resize_and_center_crop(read_image(os.fsdecode(paths[row])), transform.eval_resize_px, transform.eval_px)


class FolderImages:
    """A split whose images are read from files as needed; for sets of any size.

    Args:
        paths: N image files.
        labels: ``(N,)`` int64.
        classes: Names of the classes.
        transform: Crops and normalization.
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
        """Center crops for each array of rows; ``flip`` mirrors every one.

        Raises:
            UserError: An image cannot be read.
        """
        return self._batches(rows, partial(load_center, self._paths, self._transform), flip)

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
            yield normalize(on_device, self._transform.mean, self._transform.std), labels


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


def evaluated_images(paths: Sequence[str], info: ModelInfo, device: torch.device, num_workers: int) -> FolderImages:
    """Image files, resized, cut and normalized as ``info`` says; their labels are 0 and mean nothing."""
    transform = Transform(0, (1, 1), (1, 1), False, info.resize_px, info.crop_px, info.mean, info.std)
    return FolderImages(paths, torch.zeros(len(paths), dtype=torch.int64), [], transform, device, num_workers)
