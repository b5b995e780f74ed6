"""Unpack Tiny-ImageNet into class folders.

    python -m mrl.data.tiny_imagenet --source tiny-imagenet-200.zip --out data/tiny_imagenet

--source is the official tiny-imagenet-200.zip, the folder it unpacks to, or a folder of shards
(train-0.tar.gz, train-1.tar.gz, ..., val.tar.gz). The result is train/<wnid>/*.JPEG, val/<wnid>/*.JPEG
and, where the source has it, words.txt. --out appears only once it is complete and counted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mrl.errors import UserError
from mrl.progress import progress

NUM_SHARDS = 5
OFFICIAL_FOLDER = "tiny-imagenet-200"
# Only names of these forms are written, so no archive can reach outside --out.
WNID = re.compile(r"n\d{8}")
IMAGE_NAME = re.compile(r"\w[\w.-]*\.JPEG")


class Source(NamedTuple):
    """Where the images are, and how many train images of each class to expect there."""

    files: Iterator[tuple[str, str, str, bytes]]
    train_per_class: int
    words: bytes | None


def prepare(
    source: Path,
    out: Path,
    shards: int | None = None,
    num_classes: int = 200,
    train_per_class: int = 500,
    val_per_class: int = 50,
) -> dict[str, int]:
    """Images written to each split, after ``out`` has been filled from ``source``.

    Args:
        source: Official zip, official folder, or folder of shards.
        out: Folder to make; it must not exist.
        shards: Take only so many train shards; all by default.
        num_classes: Classes to expect.
        train_per_class: Train images of each class to expect, all shards together.
        val_per_class: Validation images of each class to expect.

    Raises:
        UserError: ``out`` exists, the source is not Tiny-ImageNet, or writing failed.
    """
    if out.exists():
        raise UserError(f"{out} already exists; remove it, or give another --out")
    if not source.exists():
        raise UserError(f"--source {source} does not exist")
    opened = open_source(source, shards, train_per_class)
    expected = {"train": opened.train_per_class, "val": val_per_class}
    unfinished = out.parent / f".{out.name}.{os.getpid()}.unfinished"
    try:
        unfinished.mkdir(parents=True)
        counts = _write(opened, unfinished, num_classes * sum(expected.values()))
        _check_counts(counts, num_classes, expected, source)
        unfinished.rename(out)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"unpacking {source} failed, nothing was left at {out}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {split: num_classes * each for split, each in expected.items()}


def open_source(source: Path, shards: int | None, train_per_class: int) -> Source:
    """The images of ``source``, whichever of the three layouts it has.

    Raises:
        UserError: It has none of them, or not so many shards.
    """
    tars = sorted(source.glob("train-*.tar.gz"), key=lambda path: (len(path.name), path.name))
    if tars:
        if shards is not None and not 1 <= shards <= len(tars):
            raise UserError(f"--shards is {shards}; allowed: 1 to {len(tars)}, the train shards in {source}")
        taken = tars[:shards]
        words = source / "words.txt"
        return Source(
            _files_in_shards([*taken, source / "val.tar.gz"]),
            train_per_class * len(taken) // NUM_SHARDS,
            words.read_bytes() if words.is_file() else None,
        )
    if shards is not None:
        raise UserError(f"--shards is {shards}, but {source} holds no shards train-0.tar.gz, train-1.tar.gz, ...")
    names, read = _zip_members(source) if zipfile.is_zipfile(source) else _folder_members(source)
    if "val/val_annotations.txt" not in names:
        raise UserError(
            f"{source} is not Tiny-ImageNet; allowed: tiny-imagenet-200.zip, the folder it unpacks to (with train/ and "
            "val/val_annotations.txt), or a folder with train-0.tar.gz, ... and val.tar.gz"
        )
    return Source(_official_files(names, read), train_per_class, read("words.txt") if "words.txt" in names else None)


def _files_in_shards(tars: list[Path]) -> Iterator[tuple[str, str, str, bytes]]:
    for path in tars:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if member.isfile() and len(parts) == 3:
                    content = tar.extractfile(member)
                    if content is not None:
                        yield parts[0], parts[1], parts[2], content.read()


def _zip_members(source: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """Names of the files below the zip's one folder, and how to read one."""
    archive = zipfile.ZipFile(source)
    names = [name.removeprefix(f"{OFFICIAL_FOLDER}/") for name in archive.namelist()]
    return names, lambda name: archive.read(f"{OFFICIAL_FOLDER}/{name}")


def _folder_members(source: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """Names of the files below the folder, and how to read one."""
    root = source / OFFICIAL_FOLDER if (source / OFFICIAL_FOLDER).is_dir() else source
    names = [(Path(folder) / name).relative_to(root).as_posix() for folder, _, files in os.walk(root) for name in files]
    return names, lambda name: (root / name).read_bytes()


def _official_files(names: list[str], read: Callable[[str], bytes]) -> Iterator[tuple[str, str, str, bytes]]:
    lines = read("val/val_annotations.txt").decode().splitlines()
    val_wnids = dict(line.split("\t")[:2] for line in lines if "\t" in line)
    for name in names:
        match name.split("/"):
            case ["train", wnid, "images", image]:
                yield "train", wnid, image, read(name)
            case ["val", "images", image] if image in val_wnids:
                yield "val", val_wnids[image], image, read(name)


def _write(source: Source, folder: Path, num_images: int) -> Counter[tuple[str, str]]:
    """How many images of each (split, wnid) were written below ``folder``."""
    counts: Counter[tuple[str, str]] = Counter()
    if source.words is not None:
        (folder / "words.txt").write_bytes(source.words)
    for split, wnid, name, content in progress(source.files, desc="unpack", total=num_images, unit="image"):
        if split in ("train", "val") and WNID.fullmatch(wnid) and IMAGE_NAME.fullmatch(name):
            class_folder = folder / split / wnid
            if not counts[split, wnid]:
                class_folder.mkdir(parents=True, exist_ok=True)
            with (class_folder / name).open("xb") as file:
                file.write(content)
            counts[split, wnid] += 1
    return counts


def _check_counts(counts: Counter[tuple[str, str]], num_classes: int, expected: dict[str, int], source: Path) -> None:
    wnids = {wnid for _, wnid in counts}
    if len(wnids) != num_classes:
        raise UserError(f"{source} holds images of {len(wnids)} classes, not {num_classes}")
    for split, each in expected.items():
        for wnid in sorted(wnids):
            if counts[split, wnid] != each:
                raise UserError(f"{source} holds {counts[split, wnid]} {split} images of class {wnid}, not {each}")


def main(argv: list[str] | None = None) -> int:
    """Prepare the data from a command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="zip, unpacked folder, or folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, e.g. data/tiny_imagenet")
    parser.add_argument("--shards", type=int, help="take only the first so many train shards (100 images a class each)")
    args = parser.parse_args(argv)
    try:
        written = prepare(args.source, args.out, args.shards)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; nothing was left at {args.out}", file=sys.stderr)
        return 130
    print(f"{args.out}: train {written['train']:,} + val {written['val']:,} images of 200 classes, counts checked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
