"""Images for training and evaluation, by one of three backends with the same batches; see `mrl.data.images`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mrl import distributed
from mrl.config import DataConfig
from mrl.data.ffcv import FFCVFile, FFCVImages, import_ffcv
from mrl.data.folder import (
    CHECK,
    LEAVE_OUT,
    FolderImages,
    ImageList,
    LeftOut,
    describe_left_out,
    leave_out_unreadable,
    list_and_hold_out,
    shown,
    unicode_name,
)
from mrl.data.imagenet import list_split
from mrl.data.images import Images, cores_per_process, default_workers
from mrl.data.memory import DIGIT_CLASSES, MemoryImages, check_memory, load_digits, read_into_memory
from mrl.data.transforms import Transform
from mrl.errors import UserError

BACKENDS: dict[type, str] = {MemoryImages: "memory", FolderImages: "folder", FFCVImages: "ffcv"}


def build_data(
    data: DataConfig,
    seed: int,
    device: torch.device,
    is_main: bool = True,
    splits: Sequence[str] = ("train", "val"),
    classes: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
) -> dict[str, Images]:
    """Return the ``splits`` that ``data`` describes; the main process prints one line about them.

    Labels are positions in ``classes``, those of a trained model; by default in the classes of the first split.
    ``held_out`` are the images that a trained model was validated on; see `mrl.data.folder.list_and_hold_out`.

    Raises:
        UserError: Files are missing, an image cannot be read, the classes are not as expected, or the backend cannot
            hold or augment the images.
    """
    backend, reason = choose_backend(data, splits)
    if not distributed.agree(list(BACKENDS.values()).index(backend)):
        raise UserError(
            "the machines do not find the same files in data.root, or FFCV is not installed on all of them, and would "
            "use different backends; copy the files again, or give --data.backend folder"
        )
    if data.rand_augment is not None and backend != "folder":
        way_out = "" if data.name == "digits" else "--data.backend folder, or "
        what = f"data.rand_augment is {data.rand_augment!r}, but only the folder backend can do that"
        raise UserError(f"{what}; give {way_out}--data.rand_augment null")
    shared = {field.name for field in dataclasses.fields(Transform)} - {"seed"}
    transform = Transform(seed, **{name: getattr(data, name) for name in shared})
    num_workers = default_workers(device) if data.num_workers is None else data.num_workers
    way_out = LEAVE_OUT if classes is None else CHECK  # an evaluation must not leave out others than the training
    images: dict[str, Images] = {}
    left_out = LeftOut()
    if data.name == "digits":
        _check_num_classes(splits[0], DIGIT_CLASSES, data.num_classes)
        digits = load_digits(data.eval_resize_px)
        images |= {split: MemoryImages(*digits[split], DIGIT_CLASSES, transform, device) for split in splits}
    elif backend == "ffcv":
        files = _open_ffcv_files(data, splits)
        left_out = align_classes(files, data, classes)
        num_threads = max(1, num_workers)
        images |= {split: FFCVImages(file, transform, device, num_threads) for split, file in files.items()}
        reason += f", {num_threads} threads"
    else:
        lists = list_splits(data, splits, is_main, held_out)
        left_out = align_classes(lists, data, classes)
        if backend == "memory":
            check_memory(sum(len(found.paths) for found in lists.values()), data.eval_resize_px, device)
        else:
            reason += f", {num_workers} worker processes"
        for split, found in lists.items():
            unreadable, names = list[str](), found.paths
            # Else a broken validation image would be found only after an epoch.
            first_pass = backend == "folder" and split != "train" and "train" in splits
            if data.max_unreadable > 0 or first_pass:
                how = split, data.max_unreadable, data.exif_rotation, cores_per_process(), is_main, way_out
                found, unreadable = leave_out_unreadable(found, *how)
            left_out += found.left_out
            if backend == "memory":
                images[split] = read_into_memory(found, transform, device, split, is_main, way_out)
            else:
                images[split] = FolderImages(found, transform, device, num_workers, way_out)
            images[split].unreadable = unreadable
            if split == "val" and holds_out(data):
                images[split].held_out = [os.path.relpath(name, data.root) for name in names]
                reason += f"; val is held out of train, because {data.root} has no val/"
    if is_main:
        sizes = " + ".join(f"{split} {len(part):,}" for split, part in images.items())
        classes = images[splits[0]].classes
        line = f"data: {data.name}, {sizes} images of {len(classes)} classes, {backend} backend ({reason})"
        if num_bytes := sum(part.num_bytes for part in images.values() if isinstance(part, MemoryImages)):
            line += f", {num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 / 10 else f", {num_bytes / 2**20:.1f} MiB"
        print(line + describe_left_out(left_out), flush=True)
    return images


def choose_backend(data: DataConfig, splits: Sequence[str]) -> tuple[str, str]:
    """Return the backend to use for ``splits``, and why."""
    if data.name == "digits" and data.backend in ("folder", "ffcv"):
        raise UserError(f"data.backend is {data.backend!r}, but digits has no image files; allowed: auto, memory")
    if data.backend != "auto":
        return data.backend, "as data.backend says"
    if data.rand_augment is not None and data.name != "digits":
        return "folder", "auto: for RandAugment"
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


def _open_ffcv_files(data: DataConfig, splits: Sequence[str]) -> dict[str, FFCVFile]:
    root = data.root
    if root is None:
        raise UserError(f"data.root is not given; data.backend ffcv needs the folder that holds {splits[0]}.beton")
    files = {}
    for split in splits:
        path = Path(root) / f"{split}.beton"
        if not path.is_file():
            command = f"python -m mrl.data.write_ffcv --root {root} --split {split}"
            raise UserError(f"{path} is missing; write it with {command}, or use data.backend folder")
        file = files[split] = FFCVFile(path)
        if file.exif_rotation != data.exif_rotation:
            raise UserError(
                f"{path} was written with --exif_rotation {file.exif_rotation}, but data.exif_rotation is "
                f"{data.exif_rotation}; write the file again, or train with --data.exif_rotation {file.exif_rotation}"
            )
    if not _agree(*(json.dumps(file.description).encode() for file in files.values())):
        raise UserError(f"data.root {root} does not hold the same .beton files on all machines; copy them again")
    return files


def _agree(*parts: bytes) -> bool:
    """Return whether all processes give the same bytes."""
    return distributed.agree(int.from_bytes(hashlib.sha256(b"".join(parts)).digest()[:7], "big"))


def holds_out(data: DataConfig) -> bool:
    """Return whether the validation images are a share of the training images."""
    return data.val_share > 0 and data.root is not None and not (Path(data.root) / "val").is_dir()


def list_splits(
    data: DataConfig, splits: Sequence[str], show_progress: bool = False, held_out: Sequence[str] | None = None
) -> dict[str, ImageList]:
    """List the image files of each split; all processes must call this, and find the same."""
    if data.root is None:
        raise UserError(f"data.root is not given; data.name {data.name} needs the folder that holds train/ and val/")
    how = show_progress, data.missing_classes
    if holds_out(data):
        both = list_and_hold_out(data.root, data.val_share, held_out, *how)
        lists = {split: both[split] for split in splits}
    else:
        lists = {split: list_split(data.name, data.root, split, *how) for split in splits}
    start = len(str(Path(data.root)))
    names = [os.fsencode("\0".join(path[start:] for path in found.paths)) for found in lists.values()]
    if not _agree(*names, *(found.labels.numpy().tobytes() for found in lists.values())):
        raise UserError(f"data.root {data.root} does not hold the same images on all machines; copy them there again")
    return lists


def _check_num_classes(split: str, classes: Sequence[str], expected: int | None) -> None:
    if expected is not None and expected != len(classes):
        raise UserError(f"data.num_classes is {expected}, but the {split} split has {len(classes)} classes")
    if split == "train" and len(classes) < 2:
        raise UserError(
            f"the train split has {len(classes)} classes ({shown(classes)}), but a classifier needs 2 or more; put "
            "images of each into a folder of its own: train/<class>/ and val/<class>/ below data.root"
        )


def align_classes(
    found: Mapping[str, ImageList | FFCVFile], data: DataConfig, classes: Sequence[str] | None
) -> LeftOut:
    """Let the labels of all splits be positions in the same classes; return the classes that a split lacks."""
    first, *_ = found
    _check_num_classes(first, found[first].classes, data.num_classes)
    expected, of_expected = found[first].classes, first
    if classes is not None and data.missing_classes == "allow":
        expected, of_expected = [unicode_name(name) for name in classes], "the trained model"
    left_out = LeftOut()
    for split, images in found.items():
        if not len(images.labels):
            raise UserError(f"the {split} split of data.root {data.root} has no images")
        absent, extra = (sorted(set(a) - set(b)) for a, b in ((expected, images.classes), (images.classes, expected)))
        if extra or (absent and data.missing_classes == "refuse"):
            hint = "; a training with --data.missing_classes allow goes on, and leaves those out of the metrics"
            if extra:
                hint = f"; no model predicts classes that it was not trained on, so move those out of {split}"
            raise UserError(
                f"the classes of {of_expected} and {split} differ: only in {of_expected}: {shown(absent)}; "
                f"only in {split}: {shown(extra)}{hint}"
            )
        position = {name: index for index, name in enumerate(expected)}
        images.labels = torch.tensor([position[name] for name in images.classes])[images.labels]
        images.classes = expected
        left_out.update((f"classes without {split} images", name) for name in absent)
    return left_out
