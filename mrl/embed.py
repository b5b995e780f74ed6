"""Embed a folder of images.

    python -m mrl.embed --run runs/digits_mrl --images DIR --dim 64 --out vectors.npy
    python -m mrl.embed --run runs/digits_mrl --images DIR --out vectors.npy                 # the full width
    torchrun --nproc_per_node=8 -m mrl.embed --run runs/resnet50_mrl --images DIR --out vectors.npy

Writes vectors.npy (a float32 row of length 1 per image), vectors.ids.txt (the image of each row) and
vectors.json (what they are of). Stop it with Ctrl-C: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mrl import distributed
from mrl.data import cores_per_process
from mrl.data.folder import IMAGE_EXTENSIONS, evaluated_images, read_tree
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.matryoshka import prefix
from mrl.model import load
from mrl.retrieval.embeddings import (
    EmbeddingMetadata,
    VectorInfo,
    embed_split,
    file_sha256,
    ids_sha256,
    info_path,
    open_vectors,
    write_vectors,
)


def embed_folder(args: argparse.Namespace, process: Process) -> None:
    """Embed on all processes; the main one writes the files and prints what they hold."""
    run, folder, out = Path(args.run), Path(args.images), Path(args.out)
    model = load(run)
    assert model.info is not None  # load fills it
    dim = model.width if args.dim is None else args.dim
    prefix(torch.empty(model.width), dim)  # says which sizes there are, before anything is written
    paths, ids, ignored = list_folder(folder)
    info = VectorInfo(
        run=str(run.resolve()),
        checkpoint_sha256=file_sha256(run / "model.safetensors"),
        trained_dims=tuple(model.head.nesting_list),
        dim=dim,
        images=str(folder.resolve()),
        ids_sha256=ids_sha256(ids),
    )
    if out.exists() and already_there(out, info):
        print(f"{out} already holds the vectors of these {len(ids):,} images by this model")
        return
    model.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    workers = cores_per_process() if args.num_workers is None else args.num_workers
    images = evaluated_images(paths, model.info, process.device, workers)
    unfinished = out.with_name(f"{out.name}.unfinished")
    metadata = EmbeddingMetadata(
        checkpoint_sha256=info.checkpoint_sha256,
        dataset=info.images,
        split=out.name,
        resize_px=model.info.resize_px,
        crop_px=model.info.crop_px,
        normalization=f"mean {model.info.mean}, std {model.info.std}",
        flip=False,
        classes_sha256=info.ids_sha256,
    )
    encode = functools.partial(model.encode, dim=dim)
    embed_split(unfinished, metadata, images, encode, dim, process, args.batch_size)
    if process.is_main:
        write_vectors(unfinished / "vectors.npy", out, ids, info)
        shutil.rmtree(unfinished)
        print(f"{out}: {len(ids):,} images x {dim} dims, length 1; ids beside it", end="")
        print(f"; {ignored:,} files ignored that are no images" if ignored else "")


def list_folder(folder: Path) -> tuple[list[str], list[str], int]:
    """Image files at any depth, their ids (paths relative to ``folder``), and the number of other files.

    Raises:
        UserError: There is no such folder, no image in it, or a name holds a line break.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder")
    tree = read_tree(folder, show_progress=True)
    ids = [os.path.join(below.path, image) for below in tree for image in below.images]
    if not ids:
        raise UserError(f"--images {folder} holds no images; allowed: {' '.join(IMAGE_EXTENSIONS)}")
    broken = next((name for name in ids if "\n" in name), None)
    if broken is not None:
        raise UserError(f"{broken!r} has a line break in its name, which a list of ids cannot hold; rename it")
    return [str(folder / name) for name in ids], ids, sum(below.num_others for below in tree)


def already_there(out: Path, info: VectorInfo) -> bool:
    """Whether ``out`` holds exactly these vectors; False where it holds others of this tool, which are replaced.

    Raises:
        UserError: ``out`` is something else.
    """
    if not info_path(out).exists():
        raise UserError(f"{out} exists and was not written by this tool; give another --out or remove it")
    try:
        return open_vectors(out).info == info
    except UserError:
        return False


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m mrl.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, help="a run directory, or a folder that mrl.export has written")
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder of images, at any depth")
    parser.add_argument("--dim", type=int, help="prefix size; default: the full width, of which every prefix is one")
    parser.add_argument("--out", required=True, metavar="FILE.npy", help="where the vectors go")
    parser.add_argument("--batch_size", type=int, default=256, help="images at a time on each process; default: 256")
    parser.add_argument("--num_workers", type=int, help="processes that decode images; default: the cores there are")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; allowed: 1 or more")
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num_workers is {args.num_workers}; allowed: 0 or more")
    if not args.out.endswith(".npy") or not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out is {args.out!r}; allowed: a file that ends in .npy, in a folder that exists")
    return args


def main(argv: list[str] | None = None) -> int:
    """Embed from a command line; return the exit status."""

    def parse_and_embed() -> int:
        embed_folder(parse(argv), distributed.start())
        return 0

    return distributed.run(parse_and_embed, "interrupted; the same command resumes the pass")


if __name__ == "__main__":
    sys.exit(main())
