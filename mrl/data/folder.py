"""Folders of images, one folder per class, decoded as needed in worker processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import itertools
import multiprocessing
import os
import re
import signal
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torchvision.transforms.v2 import InterpolationMode, functional

from mrl import distributed
from mrl.data.images import Images, LoadBatch, default_workers, map_ahead, threads_beside
from mrl.data.transforms import Transform, resize_and_center_crop
from mrl.errors import UserError
from mrl.model import ModelInfo
from mrl.progress import progress
from mrl.rgb import to_rgb

try:
    from torchcodec import decoders as torchcodec
except (ImportError, OSError, RuntimeError) as error:  # e.g. its CUDA build beside torch's CPU build
    torchcodec = None  # type: ignore[assignment]
    warnings.warn(
        f"torchcodec cannot be loaded ({str(error).strip().splitlines()[0]}), so Pillow decodes images instead: the "
        "same pixels at half the speed; install the torchcodec that belongs to your torch",
        stacklevel=1,
    )

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".avif")
JPEG_START = b"\xff\xd8\xff"
MAX_SHOWN = 5
MAX_LOOKED_INTO = 1000  # folders, for a hint
# Folders that NAS boxes, desktops, archivers and editors leave among images, in lower case; so are all hidden ones.
TOOL_FOLDERS = re.compile(
    r"\..*|@eadir|@tmp|@recycle|@recently-snapshot|@sharebin|@__thumb|#recycle|#snapshot|~snapshot|__macosx|lost\+found"
    r"|lost\.dir|found\.\d{3}|\$recycle\.bin|recycler|recycled|system volume information|temporary items"
    r"|network trash folder|_?thumbs|_?thumbnails|__thumbs__|__pycache__|cvs|_svn|_vti_cnf|.*\.lrdata"
    r"|paxheaders?(\.\d+)?|captureone|_gsdata_|resource\.frk"
)
OTHER_SPLITS = ("training", "valid", "validation")  # names that a user may have given train/ and val/
# What a listing leaves out, by kind and name.
LeftOut = Counter[tuple[str, str]]
OTHER_FILES, TOOLS, BESIDE = "files of other types", "folders of tools", "images beside the class folders"
EMPTY, UNREADABLE = "classes without images", "images that cannot be read"
CHECK = "python -m mrl.data.check DIR lists all such images, to restore or remove"
LEAVE_OUT = f"{CHECK}, and max_unreadable leaves them out"
NO_END_MARKER = (
    "a JPEG file has no end marker, but all of its pixels, and was read; python -m mrl.data.check DIR lists such files"
)


@dataclass
class ImageList:
    """The image files of a split, by class, then by path."""

    paths: list[str]
    labels: Tensor  # (N,) int64, positions in classes
    classes: list[str]  # see `unicode_name`, sorted
    left_out: LeftOut


def list_images(root: str | Path, split: str, show_progress: bool = False, missing_classes: str = "") -> ImageList:
    """List the images below ``root/split/<class>/`` at any depth, without hidden files and folders of tools.

    Class folders without images are left out if ``missing_classes`` is "allow"; errors name that way out if "refuse".
    """
    return list_classes(split_folder(root, split), split, show_progress, missing_classes)


def list_classes(top: Path, split: str, show_progress: bool, missing_classes: str) -> ImageList:
    """List the images below ``top/<class>/``; see `list_images`."""
    left_out = LeftOut()
    _, folders, files = next(walk(top, left_out))
    if not folders:
        raise UserError(f"{top} has no class folders, only {shown(files)}; put the images into {top}/<class>/")
    beside = sum(map(is_image, files))
    left_out[BESIDE, ""] += beside
    count_other_files(files, left_out)
    found = ImageList([], torch.empty(0), [], left_out)
    labels: list[int] = []
    folder_of: dict[str, str] = {}
    for folder in folders:
        if (other := folder_of.setdefault(unicode_name(folder), folder)) != folder:
            both = f"{other!a} and {folder!a}"
            raise UserError(f"{top} has two folders for one class, written in two ways: {both}; join them")
    inside: list[set[str]] = []  # of each class, the folders that hold its images; "" is its own
    for name, folder in progress(sorted(folder_of.items()), show=show_progress, desc=f"list {split}", unit="class"):
        images = find_images(top / folder, left_out)
        if images:
            found.paths += [f"{top}/{folder}/{image}" for image in images]
            labels += [len(found.classes)] * len(images)
            found.classes.append(name)
            inside.append({image.rpartition("/")[0].partition("/")[0] for image in images})
        elif missing_classes == "allow":
            left_out[EMPTY, name] += 1
        else:
            go_on = ", or train without such classes: --data.missing_classes allow (mrl.data.write_ffcv: "
            go_on = f"{go_on}--missing_classes allow)" if missing_classes == "refuse" else ""
            allowed = " ".join(IMAGE_EXTENSIONS)
            raise UserError(f"class folder {top / folder} has no images; allowed: {allowed}; remove it{go_on}")
    if len(found.classes) == 1:
        _refuse_deeper_classes(top, found.paths)
    if beside > len(labels):
        raise UserError(
            f"{top} has {beside:,} images beside its class folders and only {len(labels):,} in them; only those in "
            f"{top}/<class>/ are used, so move the others there"
        )
    deeper = set().union(*inside)
    if show_progress and "" not in deeper and sum(map(len, inside)) > len(inside):
        warn_once(
            f"the class folders of {top}, {shown(found.classes)}, hold no images of their own, only folders, "
            f"{shown(sorted(deeper))}; if those are the classes, they must be the folders of the first level"
        )
    found.labels = torch.tensor(labels, dtype=torch.int64)
    return found


def list_and_hold_out(
    root: str | Path,
    share: float,
    held_out: Collection[str] | None = None,
    show_progress: bool = False,
    missing_classes: str = "",
) -> dict[str, ImageList]:
    """List the images below ``root/train/<class>/``, or ``root/<class>/`` if there is no train/, as train and val.

    Of a class of n images, the ``share * n`` whose names have the smallest hashes are val, at least 1 and at most
    n - 1, so that images that come later move few others from one split to the other. If ``held_out`` is given, val are
    those of the images instead. Both are paths relative to ``root``.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data.root is {str(root)!r}, which is not a folder; allowed: a folder of class folders")
    top = root / "train" if (root / "train").is_dir() else root
    folders = {path.name.lower(): path.name for path in root.iterdir() if path.is_dir()}
    wrong = {*OTHER_SPLITS, *(["test"] if top == root else [])}
    wrong |= {"val"} if "train" in folders and not (root / "val").is_dir() else set()  # Train/ and Val/
    if others := sorted(folders[name] for name in wrong & folders.keys()):
        raise UserError(
            f"{root} holds {' and '.join(others)}; allowed: class folders, or train/ and val/; rename the training "
            f"images to {root}/train and those to validate on to {root}/val, or move other images away"
        )
    found = list_classes(top, "train", show_progress, missing_classes)
    names = [os.path.relpath(path, root) for path in found.paths]
    if held_out is not None:
        is_val = np.isin(names, list(held_out))
    else:
        is_val = np.zeros(len(names), dtype=bool)
        hashes = np.array([hashlib.sha256(os.fsencode(name)).hexdigest() for name in names])
        for label in range(len(found.classes)):
            own = np.flatnonzero(found.labels.numpy() == label)
            number = min(max(1, round(share * len(own))), len(own) - 1)
            is_val[own[hashes[own].argsort()[:number]]] = True
    lists = {}
    for split, chosen in (("train", ~is_val), ("val", is_val)):
        present, labels = np.unique(found.labels[chosen], return_inverse=True)
        paths, classes = [found.paths[i] for i in np.flatnonzero(chosen)], [found.classes[i] for i in present]
        left_out = found.left_out if split == "train" else LeftOut()
        lists[split] = ImageList(paths, torch.from_numpy(labels), classes, left_out)
    return lists


def _refuse_deeper_classes(top: Path, paths: list[str]) -> None:
    """Raise a `UserError` if a single class folder has no images of its own, only folders: those are the classes."""
    folders = [os.path.dirname(path) for path in paths]
    inside = os.path.commonpath(folders)
    classes = sorted({folder[len(inside) + 1 :].partition("/")[0] for folder in folders})
    if "" not in classes:
        raise UserError(
            f"{top} must hold one folder per class, but it holds a single one, {Path(inside).relative_to(top)}, with "
            f"the folders {shown(classes)} in it; if those are the classes, move them up, to {top}/{classes[0]}/ etc."
        )


def unicode_name(folder: str) -> str:
    """Return the name of a folder as Unicode in composed form (NFC), with "\\xe9" for a byte that is not UTF-8."""
    return unicodedata.normalize("NFC", os.fsencode(folder).decode(errors="backslashreplace"))


def split_folder(root: str | Path, split: str) -> Path:
    """Return the folder ``root/split``, which must exist."""
    folder = Path(root) / split
    if not Path(root).is_dir():
        raise UserError(f"data.root is {str(root)!r}, which is not a folder; allowed: a folder that holds {split}/")
    if not folder.is_dir():
        hint = "without val/, a training with --data.name folder --data.val_share 0.1 holds out a share of the images"
        if deeper := _nearest_with(split, str(root)):
            hint = f"if you mean the one in {deeper}, give that folder"
        raise UserError(f"{folder} is missing; {root} holds {shown(sorted(os.listdir(root)))}; {hint}")
    return folder


def _nearest_with(name: str, top: str) -> str | None:
    """Return the folder below ``top`` that holds a folder ``name``, nearest to it; not in a large tree."""
    folders = [top]
    for folder in itertools.islice(folders, MAX_LOOKED_INTO):  # which grows, level by level
        _, below, _ = next(os.walk(folder), ("", [], []))  # nothing if it cannot be listed
        if name in below and folder != top:
            return folder
        folders += [os.path.join(folder, each) for each in sorted(below) if not is_of_a_tool(each)]
    return None


def find_images(folder: str | Path, left_out: LeftOut, show_progress: bool = False) -> list[str]:
    """Return the image files below ``folder`` at any depth, as paths relative to it, in the order of `walk`.

    Other files, and the folders that `walk` skips, are counted in ``left_out``.
    """
    start = len(str(folder)) + 1
    found = []
    for below, _, files in progress(walk(folder, left_out), show=show_progress, desc=f"list {folder}", unit="folder"):
        found += [os.path.join(below[start:], name) for name in files if is_image(name)]
        count_other_files(files, left_out)
    return found


def count_other_files(files: Sequence[str], left_out: LeftOut) -> None:
    """Count the files that are not images in ``left_out``, by extension."""
    left_out.update((OTHER_FILES, os.path.splitext(name)[1].lower()) for name in files if not is_image(name))


def walk(top: str | Path, left_out: LeftOut | None = None) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a tree as os.walk does, in sorted order, without hidden files and folders of tools; follow links.

    Raises:
        UserError: A folder cannot be listed, or a link leads back to a folder that it is in.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error

    for folder, below, files in os.walk(str(top), onerror=fail, followlinks=True):
        tools = [name for name in below if is_of_a_tool(name)]
        if left_out is not None:
            left_out.update((TOOLS, name) for name in tools)
        below[:] = sorted(set(below) - set(tools))
        for path in [os.path.join(folder, name) for name in below if os.path.islink(os.path.join(folder, name))]:
            within = Path(os.path.abspath(path)).parents
            if any(Path(os.path.realpath(each)).is_relative_to(os.path.realpath(path)) for each in within):
                raise UserError(f"{path} is a link to {os.path.realpath(path)}, which it is in itself; remove it")
        yield folder, below, sorted(name for name in files if name[0] != ".")


def is_of_a_tool(folder: str) -> bool:
    """Whether a folder is one that a tool left, or hidden, by its name."""
    return TOOL_FOLDERS.fullmatch(folder.lower()) is not None


def is_image(name: str) -> bool:
    """Whether a file is an image by its extension."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def shown(names: Sequence[str]) -> str:
    """Return the first few names as a sentence lists them."""
    more = f" and {len(names) - MAX_SHOWN:,} more" if len(names) > MAX_SHOWN else ""
    return (", ".join(names[:MAX_SHOWN]) or "nothing") + more


def describe_left_out(left_out: LeftOut) -> str:
    """Return "; left out: 3 files of other types (.txt), 1 folders of tools (@eaDir)" or an empty string."""
    parts = []
    for kind in dict.fromkeys(kind for kind, _ in +left_out):
        names = sorted({name for one, name in left_out if one == kind and name})
        number = sum(count for (one, _), count in left_out.items() if one == kind)
        parts.append(f"{number:,} {kind} ({shown(names)})" if names else f"{number:,} {kind}")
    return "; left out: " + ", ".join(parts) if parts else ""


def decode(path: str, exif_rotation: str = "apply") -> Tensor:
    """Read an image as ``(3, H, W)`` uint8, whatever its format: see `mrl.rgb`. Gray is repeated.

    Raises:
        UserError: The file cannot be read as an image.
    """
    image, lacks_end = decode_and_mend(path, exif_rotation)
    if lacks_end:
        warn_once(NO_END_MARKER)
    return image


@functools.cache
def warn_once(message: str) -> None:
    """Warn once per process; Python's own rule forgets what it has shown whenever a library changes its filters."""
    warnings.warn(message, stacklevel=2)


def decode_and_mend(path: str, exif_rotation: str) -> tuple[Tensor, bool]:
    """Read an image as `decode` does, and return whether it is a JPEG that had to be given its end marker."""
    try:
        with open(path, "rb") as file:
            content = bytearray(file.read())  # which torch can take without a copy
        try:
            return _decode(content, exif_rotation), False
        except Exception:
            mended = _with_end_marker(content)
            if mended is None:
                raise
            return _decode(mended, exif_rotation), True
    except Exception as error:  # decoders raise errors of many kinds on bad data
        reason = str(error).split("\n")[0] or type(error).__name__
        unknown = "its format, or the kind of its pixels, is not known"
        reason = unknown if isinstance(error, UnidentifiedImageError) else reason
        raise UserError(f"{path} cannot be read as an image: {reason}") from error


def find_fault(path: str, exif_rotation: str = "apply") -> str | None:
    """Return why an image cannot be read, "" if only its end marker is missing, None if it is whole."""
    try:
        return "" if decode_and_mend(path, exif_rotation)[1] else None
    except UserError as error:
        return str(error)


def _decode(content: bytearray, exif_rotation: str) -> Tensor:
    if torchcodec is not None and exif_rotation == "apply":  # it always turns images upright
        with contextlib.suppress(RuntimeError, ValueError):  # Pillow reads more formats and has clearer messages
            encoded = torch.frombuffer(content, dtype=torch.uint8)
            if content.startswith(JPEG_START):
                return torchcodec.decode_jpeg(encoded)  # type: ignore[return-value]
            return _over_white(torchcodec.decode_image(encoded, mode="RGB_ALPHA"))
    with Image.open(io.BytesIO(content)) as image:
        return functional.pil_to_tensor(to_rgb(image, exif_rotation))


def _over_white(images: Tensor) -> Tensor:
    """Return an image ``(4, H, W)``, or the first of ``(N, 4, H, W)``, without transparency: ``(3, H, W)`` uint8."""
    image = images[0] if images.ndim == 4 else images
    colors, alpha = image[:3], image[3:].float() / 255
    return colors if alpha.min() == 1 else (colors * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


def _with_end_marker(content: bytearray) -> bytearray | None:
    """Return a JPEG with the end marker that it lacks; None if it is not a JPEG, or lacks pixels too.

    If pixels are missing, bytes that follow the file's are taken for them, and change the picture.
    """
    if not content.startswith(JPEG_START):
        return None
    kept = content.rstrip(b"\xff")  # half of an end marker
    mended, other = kept + b"\xff\xd9", kept + b"\xa5" * 64 + b"\xff\xd9"
    with Image.open(io.BytesIO(mended)) as image, Image.open(io.BytesIO(other)) as another:
        return mended if image.tobytes() == another.tobytes() else None


def leave_out_unreadable(
    images: ImageList,
    what: str,
    max_share: float,
    exif_rotation: str,
    num_threads: int,
    show_progress: bool,
    way_out: str = LEAVE_OUT,
) -> tuple[ImageList, list[str]]:
    """Decode every image once, all processes together; return the readable ones, and why the others cannot be read."""
    check, paths = functools.partial(find_fault, exif_rotation=exif_rotation), images.paths
    share = distributed.own_share(len(images.paths))
    is_bad = torch.zeros(len(paths), dtype=torch.int32)
    checked = map_ahead(check, [paths[index] for index in share], max(1, num_threads))
    bar = progress(checked, show=show_progress, total=len(share), desc=f"check {what}", unit="image")
    for index, fault in zip(share, bar, strict=True):
        is_bad[index] = bool(fault)
    is_bad = distributed.all_reduce_sum(is_bad)
    reasons = [check(paths[index]) or paths[index] for index in is_bad.nonzero()[:, 0].tolist()]
    if len(reasons) > max_share * len(paths):
        if way_out == LEAVE_OUT:
            way_out += f", here if it is {np.ceil(100 * len(reasons) / len(paths)) / 100:g} or more"
        raise UserError(f"{len(reasons):,} of {len(paths):,} {what} images cannot be read: {shown(reasons)}; {way_out}")
    kept = (is_bad == 0).nonzero()[:, 0]
    left_out = images.left_out + LeftOut({(UNREADABLE, ""): len(reasons)})
    emptied = set(images.labels.tolist()) - set(images.labels[kept].tolist())
    left_out.update((EMPTY, images.classes[label]) for label in emptied)
    return ImageList([paths[i] for i in kept.tolist()], images.labels[kept], images.classes, left_out), reasons


class FolderImages(Images):
    """A split whose images are read as needed, by ``num_workers`` processes (0: by this one); ``way_out`` is advice."""

    def __init__(
        self, images: ImageList, transform: Transform, device: torch.device, num_workers: int, way_out: str = LEAVE_OUT
    ):
        super().__init__(images.labels, images.classes, transform, device)
        self._num_workers, self._way_out = num_workers, way_out
        # One array of bytes: with a list, workers would copy a million strings by counting references to them.
        self._paths = np.array([os.fsencode(path) for path in images.paths])

    def _content(self) -> bytes:
        paths = [os.fsdecode(path) for path in self._paths]
        folder = len(os.path.commonpath(paths))
        stats = [f"{found.st_size} {found.st_mtime_ns}" for found in map(os.stat, paths)]
        files = [os.fsencode(f"{path[folder:]} {stat}\n") for path, stat in zip(paths, stats, strict=True)]
        return self.transform.exif_rotation.encode() + b"".join(files)

    def _decode(self, index: int) -> Tensor:
        return decode(os.fsdecode(self._paths[index]), self.transform.exif_rotation)

    def _train_crops(self, indices: np.ndarray, epoch: int, px: int) -> Tensor:
        how, crops = InterpolationMode(self.transform.interpolation), []
        for index in indices.tolist():
            image = self._decode(index)
            [box], [mirror] = self.transform.train_boxes(epoch, np.array([index]), np.array([image.shape[1:]]))
            crop = functional.resized_crop(image, *box.tolist(), [px, px], how, antialias=True)
            crops.append(self.transform.augment(crop.flip(2) if mirror else crop, epoch, index))
        return torch.stack(crops)

    def _center_crops(self, indices: np.ndarray) -> Tensor:
        how = self.transform.eval_resize_px, self.transform.eval_px, self.transform.interpolation
        return torch.stack([resize_and_center_crop(self._decode(index), *how) for index in indices.tolist()])

    def _load_all(self, load: LoadBatch, indices: Sequence[np.ndarray]) -> Iterator[Tensor]:
        loader: DataLoader = DataLoader(
            indices,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=functools.partial(_load_or_explain, load, self._way_out),
            num_workers=min(self._num_workers, len(indices)),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else each pass would draw from the global one
        )
        with _stop_signals_blocked():
            batches = iter(loader)
        try:
            with threads_beside(loader.num_workers):
                for images, warned in batches:
                    for message in warned:
                        warn_once(message)
                    if isinstance(images, Exception):
                        del batches  # the traceback keeps this frame, which would keep the workers
                        raise images
                    yield images
        except KeyboardInterrupt:
            _end_workers()  # torch would wait for each of them
            raise


def _load_or_explain(load: LoadBatch, way_out: str, indices: np.ndarray) -> tuple[Tensor | Exception, list[str]]:
    """Return a batch, or an error, whose message would arrive in a traceback if raised; and a worker's warnings."""
    in_worker = get_worker_info() is not None
    with warnings.catch_warnings(record=in_worker) as caught:
        try:
            found: Tensor | Exception = load(indices)
        except UserError as error:
            found = UserError(f"{error}; {way_out}")
    if in_worker and isinstance(found, Tensor):
        try:
            # Here, because where torch would do it, in the thread of a queue, an error is lost and the run waits.
            found.share_memory_()
        except (RuntimeError, OSError) as error:
            found = RuntimeError(f"shared memory is full ({str(error).splitlines()[0]})")
    return found, [str(warning.message) for warning in caught or []]


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Delay stop signals; workers started meanwhile inherit that until they ignore them."""
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


def evaluated_images(
    paths: Sequence[str], info: ModelInfo, device: torch.device, num_workers: int | None = None
) -> FolderImages:
    """Return image files without labels, resized, cropped and normalized as the model expects."""
    same: dict[str, Any] = {key: getattr(info, key) for key in ("mean", "std", "exif_rotation", "interpolation")}
    same |= {"eval_resize_px": info.resize_px, "eval_px": info.crop_px}
    transform = Transform(seed=0, crop_scale=(1, 1), crop_ratio=(1, 1), flip=False, **same)
    images = ImageList(list(paths), torch.zeros(len(paths), dtype=torch.int64), [], LeftOut())
    return FolderImages(images, transform, device, default_workers(device) if num_workers is None else num_workers)
