"""Images for training and evaluation, behind one batch contract.

A batch is ``(images, labels)``: ``(B, 3, H, W)`` float32, normalized, channels_last, and ``(B,)``
int64, both on the device. Which rows make it up is for `mrl.data.transforms` to say.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mrl import distributed
from mrl.config import DataConfig
from mrl.data.ffcv import FFCVFile, FFCVImages, import_ffcv, read_description
from mrl.data.folder import FolderImages, ImageList, list_images, shown
from mrl.data.imagenet import list_imagenet
from mrl.data.memory import DIGIT_CLASSES, MemoryImages, check_fits, decode_images, load_digits
from mrl.data.transforms import Transform
from mrl.errors import UserError

Images = MemoryImages | FolderImages | FFCVImages
BACKENDS: dict[type, str] = {MemoryImages: "memory", FolderImages: "folder", FFCVImages: "ffcv"}


def build_data(
    data: DataConfig,
    seed: int,
    device: torch.device,
    is_main: bool = True,
    splits: Sequence[str] = ("train", "val"),
) -> dict[str, Images]:
    """The splits that ``data`` describes, by name; the main process prints what they are in one line.

    Raises:
        UserError: Files are missing, an image cannot be read, the classes are not as expected, or
            the backend cannot hold them.
    """
    backend, reason = choose_backend(data, splits)
    if not distributed.agree(list(BACKENDS.values()).index(backend)):
        raise UserError(
            "the machines do not find the same at data.root, or not all of them have FFCV, and would read it by "
            "different backends; copy it there again, or give --data.backend folder"
        )
    transform = Transform(
        seed,
        data.crop_scale,
        data.crop_ratio,
        data.flip,
        data.eval_resize_px,
        data.eval_px,
        data.mean,
        data.std,
        data.rand_augment,
    )
    images: dict[str, Images]
    num_ignored = 0
    num_workers = cores_per_process() if data.num_workers is None else data.num_workers
    if data.name == "digits":
        digits = load_digits(data.eval_resize_px)
        check_classes({split: DIGIT_CLASSES for split in splits}, data.num_classes)
        images = {split: MemoryImages(*digits[split], DIGIT_CLASSES, transform, device) for split in splits}
    elif backend == "ffcv":
        ffcv_files = open_ffcv_files(data, splits)
        check_classes({split: beton.classes for split, beton in ffcv_files.items()}, data.num_classes)
        pool = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="decode")
        images = {split: FFCVImages(beton, transform, device, pool) for split, beton in ffcv_files.items()}
        reason += f", {max(1, num_workers)} threads"
    else:
        lists = list_splits(data, splits, is_main)
        check_classes({split: found.classes for split, found in lists.items()}, data.num_classes)
        if backend == "memory":
            images = read_into_memory(lists, transform, device, is_main)
        else:
            images = {s: FolderImages(*found[:3], transform, device, num_workers) for s, found in lists.items()}
            reason += f", {num_workers} worker processes"
        num_ignored = sum(found.num_ignored for found in lists.values())
    if is_main:
        print(describe(data.name, images, f"{backend} backend ({reason})", num_ignored), flush=True)
    return images


def check_rand_augment(data: DataConfig, train_images: Images) -> None:
    """Nothing, if the training images can be augmented as ``data`` says.

    Raises:
        UserError: RandAugment is asked for, but not of the folder backend.
    """
    if data.rand_augment is not None and not isinstance(train_images, FolderImages):
        raise UserError(
            f"data.rand_augment is {data.rand_augment!r}, but only the folder backend, with one image at a time in "
            "worker processes, can do that; give --data.backend folder, or --data.rand_augment null"
        )


def choose_backend(data: DataConfig, splits: Sequence[str]) -> tuple[str, str]:
    """The backend to use for ``splits``, and why.

    Raises:
        UserError: The data cannot be had that way.
    """
    if data.name == "digits" and data.backend in ("folder", "ffcv"):
        raise UserError(f"data.backend is {data.backend!r}, but digits has no image files; allowed: auto, memory")
    if data.backend != "auto":
        return data.backend, "as data.backend says"
    if data.name in ("digits", "tiny_imagenet"):
        return "memory", "auto: small set"
    names = [f"{split}.beton" for split in splits]
    if data.root is None or not all((Path(data.root) / name).is_file() for name in names):
        return "folder", "auto: set of any size"
    try:
        import_ffcv()
    except UserError:
        if not all((Path(data.root) / split).is_dir() for split in splits):
            raise
        return "folder", f"auto: FFCV cannot be imported, so {' and '.join(names)} cannot be read"
    return "ffcv", f"auto: {' and '.join(names)} found"


def open_ffcv_files(data: DataConfig, splits: Sequence[str]) -> dict[str, FFCVFile]:
    """The FFCV file of each split.

    Raises:
        UserError: The root is not given, a file is missing or not what it should be, or machines hold other ones.
    """
    if data.root is None:
        raise UserError(f"data.root is not given; data.backend ffcv needs the folder that holds {splits[0]}.beton")
    ffcv_files = {}
    for split in splits:
        path = Path(data.root) / f"{split}.beton"
        if not path.is_file():
            command = f"python -m mrl.data.write_ffcv --root {data.root} --split {split}"
            raise UserError(f"{path} is missing; write it with {command}, or use data.backend folder")
        ffcv_files[split] = FFCVFile(path, read_description(path))
    told = "".join((Path(data.root) / f"{split}.beton.json").read_text() for split in splits)
    if not distributed.agree(int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")):
        raise UserError(f"data.root {data.root} does not hold the same .beton files on all machines; copy them again")
    return ffcv_files


def list_splits(data: DataConfig, splits: Sequence[str], is_main: bool = True) -> dict[str, ImageList]:
    """The image files of each split; called on all processes, of which the main one shows how far it is.

    Raises:
        UserError: The root is not given, something below it is missing, or it is not the same for all processes.
    """
    if data.root is None:
        raise UserError(f"data.root is not given; data.name {data.name} needs the folder that holds train/ and val/")
    list_split = list_imagenet if data.name == "imagenet" else list_images
    with distributed.local_main_first():  # it lists and keeps the list, the others read that
        lists = {split: list_split(data.root, split, is_main) for split in splits}
    if not distributed.agree(digest(data.root, lists)):
        raise UserError(f"data.root {data.root} does not hold the same images on all machines; copy them there again")
    return lists


def digest(root: str, lists: dict[str, ImageList]) -> int:
    """A number that is the same where the names of the files below ``root`` and their labels are; 0 to below 2^63."""
    start = len(str(Path(root)))
    found = hashlib.sha256()
    for images in lists.values():
        found.update(os.fsencode("\0".join(path[start:] for path in images.paths)))
        found.update(images.labels.numpy().tobytes())
    return int.from_bytes(found.digest()[:8], "big") >> 1


def check_classes(classes: dict[str, Sequence[str]], num_classes: int | None) -> None:
    """Nothing, if all splits have the same classes, ``num_classes`` of them unless that is None.

    Raises:
        UserError: They have not.
    """
    (first, expected), *others = classes.items()
    if num_classes is not None and num_classes != len(expected):
        raise UserError(f"data.num_classes is {num_classes}, but the {first} split has {len(expected)} classes")
    for split, names in others:
        if list(names) != list(expected):
            missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
            raise UserError(
                f"the classes of {first} and {split} differ: only in {first}: {shown(missing)}; "
                f"only in {split}: {shown(extra)}"
            )


def read_into_memory(
    lists: dict[str, ImageList], transform: Transform, device: torch.device, is_main: bool
) -> dict[str, Images]:
    """Every image of every split, decoded.

    Raises:
        UserError: An image cannot be read, or there is no room for so many.
    """
    px = transform.eval_resize_px
    check_fits(sum(len(found.paths) for found in lists.values()), px, device)
    images: dict[str, Images] = {}
    for split, found in lists.items():
        decoded = decode_images(found.paths, px, cores_per_process(), f"decode {split}", is_main)
        images[split] = MemoryImages(decoded, found.labels, found.classes, transform, device)
    return images


def cores_per_process() -> int:
    """The CPU cores that this process may use, an equal share where torchrun started several on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def describe(name: str, images: dict[str, Images], how: str, num_ignored: int) -> str:
    """One line: what there is, how it is kept, what was left out."""
    sizes = " + ".join(f"{split} {len(part):,}" for split, part in images.items())
    num_bytes = sum(part.num_bytes for part in images.values() if isinstance(part, MemoryImages))
    line = f"data: {name}, {sizes} images of {len(next(iter(images.values())).classes)} classes, {how}"
    if num_bytes:
        line += f", {num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 / 10 else f", {num_bytes / 2**20:.1f} MiB"
    return line + (f", {num_ignored:,} files ignored that are no images" if num_ignored else "")
