"""Find every image below a folder that cannot be read, before a training or an embedding pass does.

    python -m mrl.data.check DIR

Decodes all images at any depth and lists those that cannot be read, JPEGs without an end marker (which are read), and
what is left out. If DIR holds train/ and val/, their class folders are compared too. The exit status is 1 if anything
would stop a training.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from mrl.config import DataConfig
from mrl.data import align_classes, cores_per_process
from mrl.data.folder import LeftOut, decode_and_mend, describe_left_out, find_images, list_images
from mrl.data.images import map_ahead
from mrl.errors import UserError, print_any_name
from mrl.progress import progress


def check(folder: Path, num_threads: int) -> int:
    """Print what is wrong with the images below ``folder``; return the number of faults that would stop a training."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    left_out = LeftOut()
    paths = [str(folder / name) for name in find_images(folder, left_out, show_progress=True)]
    faults = without_end = 0
    checked = map_ahead(partial(_fault, "apply"), paths, num_threads)
    for path, found in zip(paths, progress(checked, desc="check", total=len(paths), unit="image"), strict=True):
        if found == "":
            without_end += 1
            print(f"{path} is a JPEG without an end marker; all of its pixels are read")
        elif found is not None:
            faults += 1
            print(found)
    if all((folder / split).is_dir() for split in ("train", "val")):
        try:
            lists = {split: list_images(folder, split) for split in ("train", "val")}
            align_classes(lists, DataConfig(name="folder"), None)
        except UserError as error:
            faults += 1
            print(error)
    print(
        f"{folder}: {len(paths):,} images, {faults:,} faults, {without_end:,} JPEGs without an end marker"
        f"{describe_left_out(left_out)}"
    )
    return faults


def _fault(exif_rotation: str, path: str) -> str | None:
    """Return why an image cannot be read, "" if only its end marker is missing, None if it is whole."""
    try:
        return "" if decode_and_mend(path, exif_rotation)[1] else None
    except UserError as error:
        return str(error)


def main(argv: list[str] | None = None) -> int:
    """Check a folder from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mrl.data.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of images, at any depth")
    parser.add_argument(
        "--num_threads", type=int, default=cores_per_process(), help="images at once; default: the CPU cores"
    )
    args = parser.parse_args(argv)
    print_any_name()
    try:
        return int(check(args.folder, max(1, args.num_threads)) > 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
