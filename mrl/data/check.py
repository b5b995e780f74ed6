"""Find every image below a folder that cannot be read, before a training or an embedding pass does.

    python -m mrl.data.check DIR
    python -m mrl.data.check DIR --name imagenet

Decodes all images at any depth and lists those that cannot be read, JPEGs without an end marker (which are read), and
what is left out. If DIR holds train/ and val/, their class folders are checked too. The exit status is 1 if anything
would stop a training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mrl import distributed
from mrl.config import DataConfig, expand_home
from mrl.data import align_classes, cores_per_process
from mrl.data.folder import BESIDE, LeftOut, describe_left_out, find_fault, find_images
from mrl.data.imagenet import list_split
from mrl.data.images import map_ahead
from mrl.errors import UserError
from mrl.progress import progress


def check(folder: Path, name: str, num_threads: int) -> int:
    """Print what is wrong with the images below ``folder``; return the number of faults that would stop a training."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    left_out, faults, without_end = LeftOut(), 0, 0
    paths = [str(folder / image) for image in find_images(folder, left_out, show_progress=True)]
    checked = map_ahead(find_fault, paths, num_threads)
    for path, found in zip(paths, progress(checked, desc="check", total=len(paths), unit="image"), strict=True):
        if found == "":
            without_end += 1
            print(f"{path} is a JPEG without an end marker; all of its pixels are read")
        elif found is not None:
            faults += 1
            print(found)
    if name == "imagenet" or all((folder / split).is_dir() for split in ("train", "val")):
        try:
            lists = {split: list_split(name, folder, split, True, "refuse") for split in ("train", "val")}
            left_out[BESIDE, ""] = sum(found.left_out[BESIDE, ""] for found in lists.values())
            align_classes(lists, DataConfig(name="folder"), None)
        except UserError as error:
            faults += 1
            print(error)
    counts = f"{len(paths):,} images, {faults:,} faults, {without_end:,} JPEGs without an end marker"
    print(f"{folder}: {counts}{describe_left_out(left_out)}")
    return faults


def main(argv: list[str] | None = None) -> int:
    """Check a folder from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mrl.data.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of images, at any depth")
    names = "as data.name: imagenet also knows Kaggle's layout and a flat val/ with its ground truth"
    parser.add_argument("--name", choices=("folder", "imagenet"), default="folder", help=names)
    cores = cores_per_process()
    parser.add_argument("--num_threads", type=int, default=cores, help="images at once; default: the CPU cores")
    args = parser.parse_args(expand_home(argv))
    return distributed.run(lambda: int(check(args.folder, args.name, max(1, args.num_threads)) > 0), "stopped")


if __name__ == "__main__":
    sys.exit(main())
