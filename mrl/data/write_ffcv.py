"""Write a split of an image folder into one FFCV file.

    python -m mrl.data.write_ffcv --root /data/imagenet --split train --name imagenet
    python -m mrl.data.write_ffcv --root /data/imagenet --split val --name imagenet

The defaults are the paper's: longer side at most 500 px, half of the training images as JPEG of quality 90 and the
other half as raw pixels, validation images raw. --out (by default ROOT/SPLIT.beton, where train.py looks for it)
appears only once it is complete and has been read back; class names, counts and settings stand beside it in
SPLIT.beton.json. ImageNet takes about 350 GB for train and 25 GB for val.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mrl.data import cores_per_process
from mrl.data.ffcv import Description, FFCVFile, import_ffcv
from mrl.data.folder import ImageList, list_images, read_image
from mrl.data.imagenet import list_imagenet
from mrl.errors import UserError
from mrl.progress import progress
from mrl.rundir import atomic_write_text

NUM_READ_BACK = 100
MIN_PAGE_BYTES = 8 << 20  # FFCV's default


@dataclass(frozen=True)
class Settings:
    """How images are stored.

    Attributes:
        max_px: Longer side at most, in pixels; larger images are shrunk by area interpolation.
        jpeg_share: Share of the images stored as JPEG; the rest are raw pixels. Spread evenly over the rows.
        quality: Quality of the JPEGs, 1 to 100.
    """

    max_px: int = 500
    jpeg_share: float = 0.5
    quality: int = 90

    def __post_init__(self) -> None:
        if not 32 <= self.max_px <= 8192:
            raise UserError(f"--max_px is {self.max_px}; allowed: 32 to 8192")
        if not 0 <= self.jpeg_share <= 1:
            raise UserError(f"--jpeg_share is {self.jpeg_share}; allowed: 0 (all raw) to 1 (all JPEG)")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; allowed: 1 to 100")

    def is_jpeg(self, row: int) -> bool:
        """Whether the image of this row is stored as JPEG."""
        return int((row + 1) * self.jpeg_share) > int(row * self.jpeg_share)


def write(images: ImageList, split: str, out: Path, settings: Settings, num_threads: int) -> Description:
    """What stands beside ``out`` after it has been written, read back and put in place.

    Args:
        images: The images, in the order of the file's rows.
        split: Their split.
        out: File to make, .beton by custom; it must not exist. Its description is <out>.json.
        settings: How the images are stored.
        num_threads: Images worked on at once.

    Raises:
        UserError: ``out`` exists, FFCV is not installed, an image cannot be read, or writing failed; then
            nothing stands at ``out``.
    """
    check_out(out)
    unfinished = out.with_name(f".{out.name}.unfinished")  # one name, so that a killed run leaves no second one behind
    counts = images.labels.bincount(minlength=len(images.classes)).tolist()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(num_threads) as pool:  # decoding and encoding release the interpreter's lock
            encoded = in_turn(pool, images.paths, settings, 4 * num_threads)
            _write_file(unfinished, encoded, images.labels.numpy(), settings)
        num_bytes = unfinished.stat().st_size
        description = Description(split, images.classes, counts, num_bytes, asdict(settings))
        _read_back(unfinished, description, images, settings)
        atomic_write_text(Path(f"{out}.json"), description.to_json())
        os.replace(unfinished, out)
    except OSError as error:
        raise UserError(f"writing {out} failed, nothing was left there: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return description


def check_out(out: Path) -> None:
    """Nothing, if ``out`` can be made.

    Raises:
        UserError: It exists, or FFCV is not installed.
    """
    import_ffcv()
    if out.exists():
        raise UserError(f"{out} already exists; remove it, or give another --out")


def encode(path: str, settings: Settings, as_jpeg: bool) -> tuple[np.ndarray, np.ndarray]:
    """FFCV's entry for an image (mode, width, height) and the bytes to store, uint8.

    Raises:
        UserError: The image cannot be read, or not be stored in this way.
    """
    from ffcv.fields import RGBImageField

    field = RGBImageField("jpg" if as_jpeg else "raw", max_resolution=settings.max_px, jpeg_quality=settings.quality)
    pixels = read_image(path).permute(1, 2, 0).contiguous().numpy()
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


def in_turn(
    pool: ThreadPoolExecutor, paths: list[str], settings: Settings, ahead: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`encode` of every path in turn, of which at most ``ahead`` wait to be taken."""
    started: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
    rows = enumerate(paths)
    try:
        for row, path in itertools.islice(rows, ahead):
            started.append(pool.submit(encode, path, settings, settings.is_jpeg(row)))
        while started:
            yield started.popleft().result()
            for row, path in itertools.islice(rows, 1):
                started.append(pool.submit(encode, path, settings, settings.is_jpeg(row)))
    finally:
        for future in started:
            future.cancel()


def _write_file(path: Path, encoded: Iterator[Any], labels: np.ndarray, settings: Settings) -> None:
    """Put the images together with FFCV's own parts.

    Not by its writer's own loop over processes, which waits for ever for one that has ended, be it by an unreadable
    image or for want of memory.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter

    page_bytes = max(MIN_PAGE_BYTES, 1 << (3 * settings.max_px**2 - 1).bit_length())  # an image must fit on a page
    writer = DatasetWriter(str(path), {"image": RGBImageField(), "label": IntField()}, page_bytes, num_workers=1)
    writer.num_samples = len(labels)
    writer.prepare()
    try:
        entries = np.zeros(len(labels), dtype=writer.metadata_type)
        entries["f1"] = labels
        allocator = MemoryAllocator(str(path), writer.data_region_start, page_bytes)
        with allocator:
            for row, (entry, content) in enumerate(progress(encoded, desc="write", total=len(labels), unit="image")):
                allocator.set_current_sample(row)
                entry["data_ptr"], storage = allocator.malloc(content.size)
                storage[:] = content
                entries["f0"][row] = entry
        writer.metadata_sm.buf[: entries.nbytes] = entries.tobytes()
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read_back(path: Path, description: Description, images: ImageList, settings: Settings) -> None:
    """Nothing, if the file holds every label, and a sample of its images as they are encoded again now."""
    beton = FFCVFile(path, description)
    scratch = beton.scratch()
    if not np.array_equal(beton.labels, images.labels):
        raise UserError(f"{path} was written with other labels than it was given; is the disk sound?")
    for row in np.unique(np.linspace(0, len(images.paths) - 1, NUM_READ_BACK).astype(int)).tolist():
        beton.decode(row, scratch)
        if not np.array_equal(beton.stored(row), encode(images.paths[row], settings, settings.is_jpeg(row))[1]):
            raise UserError(f"{images.paths[row]} was written as other bytes than it should; is the disk sound?")


def main(argv: list[str] | None = None) -> int:
    """Write a split from a command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds train/<class>/ and val/<class>/")
    parser.add_argument("--split", choices=("train", "val"), required=True)
    parser.add_argument(
        "--name",
        choices=("folder", "imagenet"),
        default="folder",
        help="as data.name: imagenet also reads a flat val/ with its ground truth, and checks that classes are wnids",
    )
    parser.add_argument("--out", type=Path, help="file to make; default: ROOT/SPLIT.beton")
    parser.add_argument("--max_px", type=int, default=500, help="longer side at most, in pixels; default: 500")
    parser.add_argument("--jpeg_share", type=float, help="share stored as JPEG; default: 0.5 for train, 0 for val")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality, 1 to 100; default: 90")
    parser.add_argument("--num_threads", type=int, help="images worked on at once; default: the CPU cores")
    args = parser.parse_args(argv)
    out = args.out or args.root / f"{args.split}.beton"
    try:
        share = {"train": 0.5, "val": 0.0}[args.split] if args.jpeg_share is None else args.jpeg_share
        settings = Settings(args.max_px, share, args.quality)
        num_threads = cores_per_process() if args.num_threads is None else args.num_threads
        if num_threads < 1:
            raise UserError(f"--num_threads is {num_threads}; allowed: 1 or more")
        check_out(out)  # before a million files are listed
        list_split = list_imagenet if args.name == "imagenet" else list_images
        written = write(list_split(args.root, args.split, True), args.split, out, settings, num_threads)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; nothing was left at {out}", file=sys.stderr)
        return 130
    print(
        f"{out}: {sum(written.counts):,} images of {len(written.classes):,} classes, "
        f"{written.num_bytes / 2**30:.2f} GiB, labels and a sample of the pixels checked"
    )
    return 0


if __name__ == "__main__":
    # By way of an exception, so that what is unfinished is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
