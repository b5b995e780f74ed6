"""Unpack Tiny-ImageNet into class folders.

    python -m mrl.data.tiny_imagenet --source tiny-imagenet-200.zip --out data/tiny_imagenet

--source is the official tiny-imagenet-200.zip, the folder it unpacks to, or a folder of shards
(train-0.tar.gz, train-1.tar.gz, ..., val.tar.gz). The result is train/<wnid>/*.JPEG, val/<wnid>/*.JPEG
and, where the source has it, words.txt. --out appears only once it is complete and counted.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mrl import distributed
from mrl.config import expand_home
from mrl.errors import UserError
from mrl.progress import progress

OFFICIAL_FOLDER = "tiny-imagenet-200"
# Only names of this form are written, so no archive can reach outside --out.
IMAGE = re.compile(r"(train|val)/n\d{8}/\w[\w.-]*\.JPEG")


def prepare(source: Path, out: Path, expected: tuple[int, int, int] = (200, 500, 50)) -> dict[str, int]:
    """Fill the new folder ``out``; return images per split.

    ``expected`` are the numbers of classes and of train and val images per class.
    """
    num_classes, per_class = expected[0], {"train": expected[1], "val": expected[2]}
    if out.exists():
        raise UserError(f"{out} already exists; remove it, or give another --out")
    if not source.exists():
        raise UserError(f"--source {source} does not exist")
    tars = [*sorted(source.glob("train-*.tar.gz")), source / "val.tar.gz"]
    files = _files_in_shards(source, tars) if len(tars) > 1 else _official_files(source)
    counts: Counter[str] = Counter()
    unfinished = out.parent / f".{out.name}.{os.getpid()}.unfinished"
    try:
        unfinished.mkdir(parents=True)
        for name, content in progress(files, desc="unpack", total=num_classes * sum(per_class.values()), unit="image"):
            if IMAGE.fullmatch(name) or name == "words.txt":
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                with (unfinished / name).open("xb") as file:
                    file.write(content)
                counts[os.path.dirname(name)] += 1
        wnids = sorted({folder.split("/")[1] for folder in counts if folder})
        if len(wnids) != num_classes:
            raise UserError(f"{source} has images of {len(wnids)} classes, not {num_classes}")
        for split, wnid in itertools.product(per_class, wnids):
            found = counts[f"{split}/{wnid}"]
            if found != per_class[split]:
                raise UserError(f"{source} has {found} {split} images of class {wnid}, not {per_class[split]}")
        unfinished.rename(out)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"unpacking {source} failed, nothing was left at {out}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {split: num_classes * each for split, each in per_class.items()}


def _files_in_shards(source: Path, tars: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield the name split/wnid/image and the content of each file."""
    if (source / "words.txt").is_file():
        yield "words.txt", (source / "words.txt").read_bytes()
    for path in tars:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, tar.extractfile(member).read()  # type: ignore[union-attr]


def _official_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the same of the official zip or folder, whose annotations have the wnids of validation images."""
    if zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)
        read = {name.removeprefix(f"{OFFICIAL_FOLDER}/"): partial(archive.read, name) for name in archive.namelist()}
    else:
        root = source / OFFICIAL_FOLDER if (source / OFFICIAL_FOLDER).is_dir() else source
        read = {path.relative_to(root).as_posix(): path.read_bytes for path in root.rglob("*.*")}  # type: ignore[misc]
    if "val/val_annotations.txt" not in read:
        raise UserError(
            f"{source} is not Tiny-ImageNet; allowed: tiny-imagenet-200.zip, the folder it unpacks to (with train/ and "
            "val/val_annotations.txt), or a folder with train-0.tar.gz, ... and val.tar.gz"
        )
    val_wnids = dict(line.split("\t")[:2] for line in read["val/val_annotations.txt"]().decode().splitlines())
    for name in read:
        match name.split("/"):
            case ["words.txt"]:
                yield name, read[name]()
            case ["train", wnid, "images", image]:
                yield f"train/{wnid}/{image}", read[name]()
            case ["val", "images", image] if image in val_wnids:
                yield f"val/{val_wnids[image]}/{image}", read[name]()


def main(argv: list[str] | None = None) -> int:
    """Prepare the data from a command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="zip, unpacked folder, or folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, e.g. data/tiny_imagenet")
    args = parser.parse_args(expand_home(argv))

    def prepare_and_count() -> None:
        written = prepare(args.source, args.out)
        print(f"{args.out}: train {written['train']:,} + val {written['val']:,} images of 200 classes, counts checked")

    return distributed.run(prepare_and_count, f"stopped; nothing was left at {args.out}")


if __name__ == "__main__":
    sys.exit(main())
