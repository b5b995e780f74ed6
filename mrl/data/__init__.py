"""Images for training and evaluation: one batch contract, ``(images (B,3,H,W) float32, labels (B,) int64)``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mrl.config import DataConfig
from mrl.data.crops import Transform
from mrl.data.digits import load_digits
from mrl.data.folder import FolderImages, list_images, read_image, resize_and_crop
from mrl.data.memory import MemoryImages
from mrl.errors import UserError

Images = MemoryImages | FolderImages


def build_data(
    data: DataConfig,
    seed: int,
    device: torch.device,
    is_main: bool = True,
    splits: Sequence[str] = ("train", "val"),
) -> dict[str, Images]:
    """The splits that ``data`` describes; the main process says in one line what was found and how it is kept.

    Raises:
        UserError: A folder, a class or an image is missing or unreadable, or the classes are not those expected.
    """
    transform = Transform(
        seed, data.crop_scale, data.crop_ratio, data.flip, data.eval_resize_px, data.eval_px, data.mean, data.std
    )
    images: dict[str, Images] = {}
    others = 0
    backend, why = _choose_backend(data)
    if data.name == "digits":
        loaded = load_digits(data.eval_resize_px)
        classes = [str(label) for label in range(10)]
        for split in splits:
            images[split] = MemoryImages(*loaded[split], classes, transform, device)
    else:
        if data.root is None:
            raise UserError(f"data.root is not given: the folder of {data.name}, with train/ and val/ inside")
        for split in splits:
            paths, labels, classes, passed_over = list_images(Path(data.root), split)
            others += passed_over
            if backend == "memory":
                pixels = _decode(paths, data.eval_resize_px, split, is_main)
                images[split] = MemoryImages(pixels, labels, classes, transform, device)
            else:
                workers = available_cores() if data.num_workers is None else data.num_workers
                images[split] = FolderImages(paths, labels, classes, transform, device, workers)
    _check_classes(images, data.num_classes)
    if is_main:
        sizes = " + ".join(f"{split} {len(part):,}" for split, part in images.items())
        ignored = f", {others:,} other files passed over" if others else ""
        print(
            f"data: {data.name}, {sizes} images of {len(next(iter(images.values())).classes)} classes, "
            f"{backend} backend ({why}){_gigabytes(images)}{ignored}"
        )
    return images


def _choose_backend(data: DataConfig) -> tuple[str, str]:
    if data.name == "digits":
        if data.backend == "folder":
            raise UserError("data.backend folder needs image files, and digits has none; allowed: auto, memory")
        return "memory", "digits live in memory"
    if data.backend != "auto":
        return data.backend, "as asked"
    if data.name == "tiny_imagenet":
        return "memory", "auto: a small set of small images"
    return "folder", "auto: images of any number and size"


def available_cores() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode(paths: list[str], px: int, split: str, is_main: bool) -> Tensor:
    pixels = torch.empty(len(paths), 3, px, px, dtype=torch.uint8)

    def decode(i: int) -> None:
        pixels[i] = resize_and_crop(read_image(paths[i]), px, px)

    with ThreadPoolExecutor(available_cores()) as pool:
        done = pool.map(decode, range(len(paths)), chunksize=64)
        for _ in tqdm(done, f"decode {split}", len(paths), unit="img", disable=not is_main, delay=2):
            pass
    return pixels


def _check_classes(images: dict[str, Images], num_classes: int | None) -> None:
    parts = list(images.items())
    (first, reference), rest = parts[0], parts[1:]
    for split, part in rest:
        if part.classes != reference.classes:
            only = [
                f"only in {name}: {', '.join(sorted(set(a.classes) - set(b.classes))[:5])}"
                for name, a, b in ((first, reference, part), (split, part, reference))
                if set(a.classes) - set(b.classes)
            ]
            raise UserError(f"{first} and {split} hold different classes ({'; '.join(only)})")
    if num_classes is not None and num_classes != len(reference.classes):
        raise UserError(
            f"data.num_classes is {num_classes}, but the data has {len(reference.classes)} classes; "
            "give that number, or null to take what is there"
        )


def _gigabytes(images: dict[str, Images]) -> str:
    size = sum(part.images.numel() for part in images.values() if isinstance(part, MemoryImages))
    return f", {size / 2**30:.2f} GiB" if size else ""
