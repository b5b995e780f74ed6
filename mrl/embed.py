"""Embed a folder of images.

    python -m mrl.embed --run runs/digits_mrl --images DIR --out vectors.npy
    python -m mrl.embed --run runs/digits_mrl --images DIR --dim 64 --out vectors.npy
    torchrun --nproc_per_node=8 -m mrl.embed --run runs/resnet50_mrl --images DIR --out vectors.npy

Writes vectors.npy (float32, one row of length 1 per image), vectors.ids.txt (the image of each row) and vectors.json
(model and images). After Ctrl-C the same command continues. Vectors of these images by this model are kept, unless an
image was replaced since then.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mrl import distributed
from mrl.config import expand_home
from mrl.data import cores_per_process
from mrl.data.folder import (
    IMAGE_EXTENSIONS,
    ImageList,
    LeftOut,
    describe_left_out,
    evaluated_images,
    find_images,
    leave_out_unreadable,
)
from mrl.distributed import Process
from mrl.engine import FastForward, good_batch_size
from mrl.errors import UserError
from mrl.matryoshka import unit_prefix
from mrl.model import load
from mrl.retrieval.embeddings import (
    EmbeddingMetadata,
    alone_in,
    classes_sha256,
    embed_split,
    file_sha256,
    files_sha256,
    open_vectors,
    read_metadata,
    write_vectors,
)
from mrl.retrieval.search import describe_zero_prefixes
from mrl.training.frozen import Trunk


def embed_folder(args: argparse.Namespace, process: Process) -> None:
    """Embed on all processes; the main one writes the files."""
    run, folder, out = Path(args.run), Path(args.images), Path(args.out)
    model = load(run)
    info, dim = model.info, model.check_dim(args.dim)
    paths, left_out = list_images(folder, args.max_unreadable, info.exif_rotation, process)
    ids = [path[len(str(folder)) + 1 :] for path in paths]
    files = files_sha256([Path(path) for path in paths])
    if not distributed.agree(int(files[:14], 16)):
        raise UserError(f"--images {folder} does not hold the same files, of the same times, on all machines; share it")
    metadata = EmbeddingMetadata(
        checkpoint_sha256=file_sha256(run / "model.safetensors"),
        dataset=str(folder.resolve()),
        split=out.stem,
        resize_px=info.resize_px,
        crop_px=info.crop_px,
        normalization=f"mean {info.mean}, std {info.std}",
        interpolation=info.interpolation,
        flip=False,
        classes_sha256=classes_sha256(ids),
        files_sha256=files,
        run=str(run.resolve()),
        trained_dims=list(info.nesting_list),
    )
    unfinished = out.with_name(f"{out.name}.unfinished")

    def is_needed() -> bool:
        return args.force or distributed.all_reduce_any(not already_there(out, metadata, dim))[0]

    with alone_in(unfinished, process, args.force) if is_needed() else contextlib.nullcontext():
        if not is_needed():  # another command may have been faster
            if process.is_main:
                print(f"{out} already holds the vectors of these {len(ids):,} images by this model")
            return
        model.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.warn_if_untrained(dim)
        images = evaluated_images(paths, info, process.device, args.num_workers)
        engines: list[str] = []
        forward = FastForward(Trunk(model.backbone, whole=True), len(ids), engines.append)
        size = args.batch_size or good_batch_size(process.device)
        embed_split(unfinished, metadata, images, lambda batch: unit_prefix(forward(batch), dim), dim, process, size)
        if process.is_main:
            write_vectors(unfinished / "vectors.npy", out, ids, metadata)
            shutil.rmtree(unfinished)
            trained = {size for size in info.nesting_list if size < dim}
            if zeros := describe_zero_prefixes(open_vectors(out).vectors, [*trained, dim]):
                print(zeros)
            by = f", computed by {engines[0]}" if engines else ""  # a pass that was killed at its end computes nothing
            print(f"{out}: {len(ids):,} images x {dim} dims, length 1{by}; ids beside it{describe_left_out(left_out)}")


def list_images(folder: Path, max_unreadable: float, exif_rotation: str, process: Process) -> tuple[list[str], LeftOut]:
    """Return the paths of the image files below ``folder``, and what else is there."""
    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder")
    left_out = LeftOut()
    paths = [f"{folder}/{name}" for name in find_images(folder, left_out, show_progress=process.is_main)]
    if broken := [path for path in paths if "\n" in path]:  # .ids.txt has a line for each
        raise UserError(f"the name {broken[0]!a} has a line break; rename it")
    if not paths:
        raise UserError(f"--images {folder} holds no images; allowed: {' '.join(IMAGE_EXTENSIONS)}")
    if max_unreadable > 0:
        listed = ImageList(paths, torch.zeros(len(paths)), [], left_out)
        how = max_unreadable, exif_rotation, cores_per_process()
        listed, reasons = leave_out_unreadable(listed, str(folder), *how, show_progress=process.is_main)
        paths, left_out = listed.paths, listed.left_out
        if process.is_main and reasons:
            print(*reasons, sep="\n", file=sys.stderr)
    return paths, left_out


def already_there(out: Path, metadata: EmbeddingMetadata, dim: int) -> bool:
    """Return whether ``out`` holds exactly these vectors; other vectors of this tool are replaced."""
    for path in (out, about := out.with_suffix(".json")):
        if path.exists() and read_metadata(about) is None:
            raise UserError(f"{path} exists and was not written by this tool; give another --out or remove it")
    try:
        found = open_vectors(out)
    except UserError:
        return False
    return found.metadata == metadata and found.vectors.shape[1] == dim


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m mrl.embed", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    add = parser.add_argument
    add("--run", required=True, help="a run directory, or a folder that mrl.export wrote")
    add("--images", required=True, metavar="DIR", help="a folder of images, at any depth")
    add("--dim", type=int, help="prefix size; default: the largest trained one")
    add("--out", required=True, metavar="FILE.npy", help="file for the vectors")
    add("--batch_size", type=int, help="images at a time on each process; default: 256 on a GPU, 32 on a CPU")
    workers = "processes that decode images; default: the cores, without a GPU a quarter of them (0 below 4)"
    add("--num_workers", type=int, help=workers)
    unreadable = "share of the images that may be unreadable and are left out; above 0, each is decoded twice"
    add("--max_unreadable", type=float, default=0.0, help=unreadable)
    add("--force", action="store_true", help="compute the vectors again, also if they are there")
    args = parser.parse_args(expand_home(argv))
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; allowed: 1 or more")
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num_workers is {args.num_workers}; allowed: 0 or more")
    if not 0 <= args.max_unreadable < 1:
        raise UserError(f"--max_unreadable is {args.max_unreadable}; allowed: 0 to below 1")
    if not args.out.endswith(".npy") or not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out is {args.out!r}; allowed: a .npy file in an existing folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Embed from a command line; return the exit status."""
    return distributed.run(lambda: embed_folder(parse(argv), distributed.start()), "stopped; the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
