"""Find the images most similar to one, at several prefix sizes of the same vectors.

    python -m mrl.search --vectors vectors.npy --image X.jpg
    python -m mrl.search --vectors vectors.npy --image X.jpg --dims 8 64 512 --k 5 --out neighbors
    python -m mrl.search --vectors vectors.npy --image X.jpg --map map.safetensors

Prints the neighbors (rank, cosine, folder, image) and draws them, one row per size. The vectors are those of python -m
mrl.embed, which can be searched at every size up to their own. With --map they are searched as a map of python -m
mrl.adapt changes them. --exclude_query leaves out the image that is searched for, if it is among them.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mrl import adapt, distributed
from mrl.config import expand_home
from mrl.data.folder import decode, evaluated_images, unicode_name
from mrl.errors import UserError
from mrl.figures import save
from mrl.figures.neighbors import neighbor_grid
from mrl.model import load
from mrl.retrieval.embeddings import VectorFile, file_sha256, folder_of, open_vectors
from mrl.retrieval.search import describe_zero_prefixes, exact_search


def search(args: argparse.Namespace) -> None:
    """Search, print the neighbors, and draw them."""
    path = Path(args.vectors)
    database = open_vectors(path)
    vectors, trained = database.vectors, database.metadata.trained_dims
    picture = decode(args.image)
    query = encode_query(args.image, database, Path(args.run or database.metadata.run))
    if args.map:
        mapping = adapt.load(args.map)
        vectors, trained, query = mapping(vectors), list(mapping.dims), mapping(query)
    width = vectors.shape[1]
    dims = args.dims or sorted({dim for dim in trained if dim <= width} | {width})
    for dim in dims:
        if not 1 <= dim <= width:
            raise UserError(f"--dims asks for {dim}, but the vectors in {path} have {width} dims")
        if dim not in trained:
            warnings.warn(f"{dim} dims were not trained; trained are {trained}", stacklevel=2)
    folder = database.folder(args.images)
    top, image = folder.resolve(), Path(os.path.abspath(args.image))
    itself = [image.resolve(), *(top / image.relative_to(up) for up in image.parents if up.resolve() == top)]  # a link
    left_out = [i for i, name in enumerate(database.ids) if args.exclude_query and top / name in itself]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prefixes are all zero")  # said below
        found = exact_search(query, vectors, min(args.k + 1, len(vectors)), dims, progress=True)
    if zeros := describe_zero_prefixes(vectors, dims):
        print(zeros)
    pictures: dict[int, list[tuple[torch.Tensor, str]]] = {}
    for dim, (indices, scores) in found.items():
        is_zero = not np.any(query[0, :dim])
        print(f"{args.image} at {dim} dims{': its prefix is all zero, so it has no neighbors' if is_zero else ''}")
        kept = np.any(vectors[indices[0], :dim], axis=1) & ~np.isin(indices[0], left_out) & (not is_zero)
        names = [database.ids[index] for index in indices[0][kept][: args.k]]
        longest = max((len(folder_of(name)) for name in names), default=0)
        pictures[dim] = []
        for rank, (name, score) in enumerate(zip(names, scores[0][kept], strict=False), 1):
            print(f"  {rank:>2}  {score:.4f}  {folder_of(name):<{longest}}  {name}")
            caption = f"{unicode_name(folder_of(name))}\n{score:.3f}".strip()
            pictures[dim].append((decode(str(folder / name)), caption))
    for drawn in save(neighbor_grid(picture, pictures), args.out or path.with_name("neighbors")):
        print(f"figure: {drawn}")


def encode_query(image: str, database: VectorFile, run: Path) -> np.ndarray:
    """Return the image's embedding ``(1, dim)`` by the model that made the vectors."""
    if not run.is_dir():
        raise UserError(f"the model {run} that made the vectors does not exist; give its new place with --run")
    model = load(run)
    if file_sha256(run / "model.safetensors") != database.metadata.checkpoint_sha256:
        raise UserError(f"the vectors were made by other weights than those in {run}; embed the images again")
    images = evaluated_images([image], model.info, torch.device("cpu"), num_workers=0)
    [(batch, _)] = images.eval_batches([np.array([0])])
    with torch.no_grad():
        return model.embed(batch)[:, : database.vectors.shape[1]].numpy()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m mrl.search", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    add = parser.add_argument
    add("--vectors", required=True, metavar="FILE.npy", help="file that python -m mrl.embed wrote")
    add("--image", required=True, help="the image to find similar ones to")
    add("--dims", type=int, nargs="+", help="prefix sizes; default: the trained ones")
    add("--map", metavar="FILE.safetensors", help="a map that python -m mrl.adapt fitted to such vectors")
    add("--k", type=int, default=6, help="neighbors at each size; default: 6")
    add("--exclude_query", action="store_true", help="do not find the image itself (a copy of it is found)")
    add("--out", metavar="STEM", help="the figure, without .png; default: neighbors, beside the vectors")
    add("--run", help="the model, if it was moved")
    add("--images", metavar="DIR", help="the folder of images, if it was moved")
    args = parser.parse_args(expand_home(argv))
    if args.k < 1:
        raise UserError(f"--k is {args.k}; allowed: 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Search from the command line and return the exit status."""
    return distributed.run(lambda: search(parse(argv)), "stopped")


if __name__ == "__main__":
    sys.exit(main())
