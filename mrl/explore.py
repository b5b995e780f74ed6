"""Write one HTML page that shows the neighbors of every image at every prefix size.

    python -m mrl.explore --vectors vectors.npy
    python -m mrl.explore --vectors vectors.npy --map map.safetensors --out explore.html
    python -m mrl.explore --run runs/digits_mrl

The page is a single file with thumbnails and int8 vectors. It needs no server and requests nothing. The vectors are
those of python -m mrl.embed, or those of the validation images of a run that eval.py has embedded.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from mrl import adapt, distributed
from mrl.config import expand_home
from mrl.data import cores_per_process
from mrl.data.folder import decode
from mrl.data.images import map_ahead
from mrl.errors import UserError
from mrl.progress import progress
from mrl.retrieval.embeddings import folder_of, open_vectors
from mrl.retrieval.search import count_zero_prefixes, describe_zero_prefixes, exact_search
from mrl.rundir import atomic_write_text
from mrl.studies.run import open_run

NEIGHBORS = 12
THUMBNAIL_PX = 144
TEMPLATE = Path(__file__).with_suffix(".html")


class Collection(NamedTuple):
    """Images to explore: names, folder or class names and vectors ``(N, D)``, and how to see image i."""

    title: str
    names: list[str]
    folders: list[str]
    vectors: np.ndarray
    trained: Sequence[int]
    picture: Callable[[int], Image.Image]


def of_vectors(path: str, moved_to: str | None) -> Collection:
    """Return the images of a vector file."""
    file = open_vectors(path)
    folder = file.folder(moved_to)
    names = [os.fsencode(name).decode(errors="backslashreplace") for name in file.ids]  # JSON takes no others
    trained = [dim for dim in file.metadata.trained_dims if dim <= file.vectors.shape[1]]
    title = f"{'/'.join(folder.resolve().parts[-2:])} by {Path(file.metadata.run).name}"
    folders = [folder_of(name) for name in names]

    def picture(index: int) -> Image.Image:
        return to_pil_image(decode(str(folder / file.ids[index])))

    return Collection(title, names, folders, file.vectors, trained, picture)


def of_run(path: str, moved_to: str | None) -> Collection:
    """Return the validation images of a run."""
    run = open_run(path, moved_to)
    run.images("val", np.array([0]))  # reads the files once, before many threads ask for pictures
    folders = [run.classes[label] for label in run.val.labels]
    names = [f"{folder}, validation image {index}" for index, folder in enumerate(folders)]
    trained = run.head.nesting_list
    title = f"{run.source.dataset}, validation images, by {run.source.run}"

    def picture(index: int) -> Image.Image:
        return Image.fromarray((255 * run.pictures("val", np.array([index]))[0]).round().astype(np.uint8))

    return Collection(title, names, folders, run.val.vectors[:, : trained[-1]], trained, picture)


def slider_stops(trained: Sequence[int], width: int) -> list[int]:
    """Return the sizes of the slider: those trained, and of 1, 2, 3, 4, 6, 8, ... those from half the smallest.

    >>> slider_stops([10, 20, 40], 40)
    [6, 8, 10, 12, 16, 20, 24, 32, 40]
    """
    between = [size << power for size in (1, 3) for power in range(width.bit_length())]
    return sorted({size for size in between if min([*trained, width]) <= 2 * size < 2 * width} | {*trained, width})


def int8_codes(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes ``(N, D)`` int8 and the step ``(D,)`` float32 of each coordinate: vectors ≈ codes * steps."""
    steps = np.abs(vectors).max(axis=0) / 127
    steps = np.where(steps > 0, steps, 1).astype(np.float32)
    return np.rint(vectors / steps).astype(np.int8), steps


def agreement(vectors: np.ndarray, k: int, dims: Sequence[int]) -> list[float]:
    """Return the mean share of the ``k`` neighbors by whole vectors that each prefix finds."""
    itself, width = np.arange(len(vectors))[:, None], vectors.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prefixes are all zero")  # they share nothing
        found = exact_search(vectors, vectors, k + 1, [*dims, width])

    def others(indices: np.ndarray) -> np.ndarray:  # (N, k), without the image or else the farthest
        drop = indices == itself
        drop[~drop.any(axis=1), -1] = True
        return indices[~drop].reshape(len(indices), k)

    true, shares = others(found[width][0]), []
    for dim in dims:
        indices = np.where(np.any(vectors[:, :dim], axis=1)[:, None], others(found[dim][0]), -1)
        shares.append(float((indices[:, :, None] == true[:, None, :]).sum() / (k * len(vectors))))
    return shares


def explore(args: argparse.Namespace) -> None:
    """Write the page and print where it is."""
    images = of_run(args.run, args.images) if args.run else of_vectors(args.vectors, args.images)
    vectors, trained = images.vectors, list(images.trained)
    if args.map:
        mapping = adapt.load(args.map)
        vectors, trained = mapping(vectors), list(mapping.dims)
    total, width = vectors.shape
    if total < 2:
        raise UserError(f"there is {total} image; an explorer needs 2 or more")
    chosen = np.arange(total)
    if total > args.max_images:
        chosen = np.sort(np.random.default_rng(0).choice(total, args.max_images, replace=False))
        print(f"{args.max_images:,} of {total:,} images, chosen at random with seed 0; --max_images takes more")
    vectors = np.asarray(vectors[chosen], dtype=np.float32)
    if zeros := describe_zero_prefixes(vectors, trained):
        print(zeros)
    codes, steps = int8_codes(vectors)
    stops, k = slider_stops(trained, width), min(NEIGHBORS, len(chosen) - 1)
    seen = map_ahead(lambda index: thumbnail(images.picture(index)), chosen.tolist(), cores_per_process())
    folders = sorted({images.folders[index] for index in chosen})
    content = {
        "title": images.title,
        "total": total,
        "names": [images.names[index] for index in chosen],
        "group": "class" if args.run else "folder",
        "folders": folders,
        "folderOf": [folders.index(images.folders[index]) for index in chosen],
        "thumbnails": list(progress(seen, total=len(chosen), desc="thumbnails", unit="image")),
        "codes": base64.b64encode(codes.tobytes()).decode(),
        "steps": steps.tolist(),
        "width": width,
        "k": k,
        "stops": stops,
        "trained": trained,
        "zeros": list(count_zero_prefixes(codes, stops).values()),
        "agreement": agreement(codes * steps, k, stops),
    }
    out = Path(args.out or Path(args.run or Path(args.vectors).parent) / "explore.html")
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    atomic_write_text(out, TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", data))
    print(f"{out}: {len(chosen):,} images, {out.stat().st_size / 2**20:.1f} MiB; open it in a browser")


def thumbnail(image: Image.Image) -> str:
    """Return the middle square of an RGB image as WebP in base64; small images are not enlarged."""
    px, content = min(*image.size, THUMBNAIL_PX), io.BytesIO()
    ImageOps.fit(image, (px, px), Image.Resampling.LANCZOS).save(content, "WEBP", quality=75)
    return base64.b64encode(content.getvalue()).decode()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m mrl.explore", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vectors", metavar="FILE.npy", help="file that python -m mrl.embed wrote")
    source.add_argument("--run", metavar="DIR", help="a run directory that eval.py has embedded")
    add("--map", metavar="FILE.safetensors", help="a map that python -m mrl.adapt fitted to such vectors")
    add("--max_images", type=int, default=2000, help="more are cut to a random choice, always the same; default: 2000")
    add("--images", metavar="DIR", help="the folder of images, if it was moved")
    add("--out", metavar="FILE.html", help="the page; default: explore.html beside the vectors or in the run")
    args = parser.parse_args(expand_home(argv))
    if args.max_images < 2:
        raise UserError(f"--max_images is {args.max_images}; allowed: 2 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Write a page from the command line and return the exit status."""
    return distributed.run(lambda: explore(parse(argv)), "stopped")


if __name__ == "__main__":
    sys.exit(main())
