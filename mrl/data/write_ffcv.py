"""Write a split of an image folder into one FFCV file.

    python -m mrl.data.write_ffcv --root /data/imagenet --split train --name imagenet
    python -m mrl.data.write_ffcv --root /data/imagenet --split val --name imagenet

The defaults are the paper's: longer side at most 500 px, half of the training images as JPEG of quality 90 and the
other half as raw pixels, validation images raw. --out (default: ROOT/SPLIT.beton, where train.py looks for it)
appears only once it is complete; class names, counts and settings are in SPLIT.beton.json beside it. ImageNet takes
about 350 GB for train and 25 GB for val.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mrl import distributed
from mrl.config import expand_home
from mrl.data import cores_per_process
from mrl.data.ffcv import FFCVFile, import_ffcv
from mrl.data.folder import LEAVE_OUT, ImageList, decode, describe_left_out, leave_out_unreadable
from mrl.data.imagenet import list_split
from mrl.data.images import map_ahead
from mrl.errors import UserError
from mrl.progress import progress
from mrl.rundir import atomic_write_text

MIN_PAGE_BYTES = 8 << 20  # FFCV's default


@dataclass(frozen=True)
class Settings:
    """How images are stored: longer side at most ``max_px``, a share as JPEGs of a quality, the rest as raw pixels."""

    max_px: int = 500
    jpeg_share: float = 0.5
    quality: int = 90
    exif_rotation: str = "apply"  # see `mrl.config.DataConfig`

    def is_jpeg(self, index: int) -> bool:
        """Whether the image at ``index`` is stored as JPEG; those are spread evenly."""
        return int((index + 1) * self.jpeg_share) > int(index * self.jpeg_share)


def write(images: ImageList, split: str, out: Path, settings: Settings, num_threads: int) -> FFCVFile:
    """Write ``out`` and its description <out>.json; they appear after they have been opened and checked."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    counts = images.labels.bincount(minlength=len(images.classes)).tolist()
    description: dict[str, Any] = {"split": split, "classes": images.classes, "counts": counts}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write_file(unfinished, images, settings, num_threads)
        description |= {"settings": asdict(settings), "num_bytes": unfinished.stat().st_size}
        atomic_write_text(Path(f"{unfinished}.json"), json.dumps(description) + "\n")
        FFCVFile(unfinished)
        os.replace(f"{unfinished}.json", f"{out}.json")
        os.replace(unfinished, out)
    except OSError as error:
        raise UserError(f"writing {out} failed, nothing was left there: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
        Path(f"{unfinished}.json").unlink(missing_ok=True)
    return FFCVFile(out)


def encode(images: ImageList, settings: Settings, index: int) -> tuple[Any, np.ndarray]:
    """Return FFCV's entry for an image (mode, width, height) and the bytes to store."""
    from ffcv.fields import RGBImageField

    path, mode = images.paths[index], "jpg" if settings.is_jpeg(index) else "raw"
    field = RGBImageField(mode, max_resolution=settings.max_px, jpeg_quality=settings.quality)
    try:
        pixels = decode(path, settings.exif_rotation).permute(1, 2, 0).contiguous().numpy()
    except UserError as error:
        raise UserError(f"{error}; {LEAVE_OUT}") from error
    entry, content = np.zeros(1, dtype=field.metadata_type), []

    def allocate(num_bytes: int) -> tuple[int, np.ndarray]:
        content.append(np.empty(num_bytes, dtype=np.uint8))
        return 0, content[0]

    try:
        field.encode(entry, pixels, allocate)
    except Exception as error:  # OpenCV's, e.g. of an image 3000 wide and 2 high, which would shrink to nothing
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be stored at --max_px {settings.max_px}: {reason}") from error
    return entry[0], content[0]


def _write_file(path: Path, images: ImageList, settings: Settings, num_threads: int) -> None:
    """Write with FFCV's own parts, but not its loop over processes, which waits forever for one that has died."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter

    num_images = len(images.paths)
    page_bytes = max(MIN_PAGE_BYTES, 1 << (3 * settings.max_px**2 - 1).bit_length())  # an image must fit on a page
    writer = DatasetWriter(str(path), {"image": RGBImageField(), "label": IntField()}, page_bytes, num_workers=1)
    writer.num_samples = num_images
    writer.prepare()
    try:
        entries = np.zeros(num_images, dtype=writer.metadata_type)
        entries["f1"] = images.labels.numpy()
        allocator = MemoryAllocator(str(path), writer.data_region_start, page_bytes)
        encoded = map_ahead(partial(encode, images, settings), range(num_images), num_threads)
        with allocator:
            for index, (entry, content) in enumerate(progress(encoded, desc="write", total=num_images, unit="image")):
                allocator.set_current_sample(index)
                entry["data_ptr"], storage = allocator.malloc(content.size)
                storage[:] = content
                entries["f0"][index] = entry
        writer.metadata_sm.buf[: entries.nbytes] = entries.tobytes()
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def main(argv: list[str] | None = None) -> int:
    """Write a split from a command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, required=True, help="folder that holds train/<class>/ and val/<class>/")
    add("--split", choices=("train", "val"), required=True)
    names = "as data.name: imagenet also reads a flat val/ with its ground truth, and checks that classes are wnids"
    add("--name", choices=("folder", "imagenet"), default="folder", help=names)
    add("--out", type=Path, help="file to make; default: ROOT/SPLIT.beton")
    add("--max_px", type=int, default=500, help="longer side at most, in pixels; default: 500")
    add("--jpeg_share", type=float, help="share stored as JPEG; default: 0.5 for train, 0 for val")
    add("--quality", type=int, default=90, help="JPEG quality, 1 to 100; default: 90")
    add("--exif_rotation", choices=("apply", "ignore"), default="apply", help="as data.exif_rotation")
    add("--missing_classes", choices=("refuse", "allow"), default="refuse", help="as data.missing_classes")
    add("--max_unreadable", type=float, default=0.0, help="as data.max_unreadable")
    cores = cores_per_process()
    add("--num_threads", type=int, default=cores, help="images encoded at once; default: the CPU cores")
    args = parser.parse_args(expand_home(argv))
    out = args.out or args.root / f"{args.split}.beton"

    def list_and_write() -> None:
        share = args.jpeg_share if args.jpeg_share is not None else 0.5 if args.split == "train" else 0.0
        args.jpeg_share = share
        settings = Settings(args.max_px, share, args.quality, args.exif_rotation)
        limits = {"max_px": (32, 8192), "jpeg_share": (0, 1), "quality": (1, 100), "num_threads": (1, 1024)}
        for name, (low, high) in {**limits, "max_unreadable": (0, 0.99)}.items():
            if not low <= getattr(args, name) <= high:
                raise UserError(f"--{name} is {getattr(args, name)}; allowed: {low} to {high}")
        import_ffcv()
        if out.exists():  # asked before a million files are listed
            raise UserError(f"{out} already exists; remove it, or give another --out")
        images = list_split(args.name, args.root, args.split, True, args.missing_classes)
        if args.max_unreadable > 0:
            how = args.max_unreadable, args.exif_rotation, args.num_threads
            images, reasons = leave_out_unreadable(images, args.split, *how, show_progress=True)
            print(*reasons, sep="\n", file=sys.stderr)
        written = write(images, args.split, out, settings, args.num_threads)
        print(
            f"{out}: {len(written.labels):,} images of {len(written.classes):,} classes, "
            f"{out.stat().st_size / 2**30:.2f} GiB{describe_left_out(images.left_out)}"
        )

    return distributed.run(list_and_write, f"stopped; nothing was left at {out}")


if __name__ == "__main__":
    # By an exception, so that the unfinished file is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
