"""Find the images most like one, at several prefix sizes of the same vectors.

    python -m mrl.search --vectors vectors.npy --image X.jpg
    python -m mrl.search --vectors vectors.npy --image X.jpg --dims 8 64 512 --k 5 --out neighbors

Prints the neighbors and draws them, a row per size. The vectors are those of python -m mrl.embed; a
full-width file can be searched at every size, a shorter one up to its own.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mrl.data.folder import evaluated_images, read_image
from mrl.errors import UserError
from mrl.figures import save
from mrl.figures.neighbors import neighbor_grid
from mrl.model import load
from mrl.retrieval.embeddings import VectorFile, file_sha256, open_vectors
from mrl.retrieval.search import exact_search


def search(args: argparse.Namespace) -> None:
    """Search, print the neighbors, draw them."""
    path = Path(args.vectors)
    database = open_vectors(path)
    dims = args.dims or default_dims(database)
    check_dims(dims, database, path)
    query = encode_query(args.image, database, Path(args.run or database.info.run))
    found = exact_search(query, database.vectors, min(args.k, len(database.ids)), dims, progress=True)
    folder = Path(args.images or database.info.images)
    for dim, (indices, scores) in found.items():
        print(f"{args.image} at {dim} dims")
        for rank, (row, score) in enumerate(zip(indices[0], scores[0], strict=True), 1):
            print(f"  {rank:>2}  {score:.4f}  {database.ids[row]}")
    rows = {
        dim: [(read_image(str(folder / database.ids[row])), f"{s:.3f}") for row, s in zip(i[0], scores[0], strict=True)]
        for dim, (i, scores) in found.items()
    }
    figure = neighbor_grid(read_image(args.image), rows)
    for drawn in save(figure, args.out or path.with_name("neighbors")):
        print(f"figure: {drawn}")


def default_dims(database: VectorFile) -> list[int]:
    """The trained sizes that the vectors have, and their full length."""
    info = database.info
    return sorted({dim for dim in info.trained_dims if dim <= info.dim} | {info.dim})


def check_dims(dims: Sequence[int], database: VectorFile, path: Path) -> None:
    """Nothing but a warning of sizes that were not trained.

    Raises:
        UserError: A size is not between 1 and the length of the vectors.
    """
    info = database.info
    for dim in dims:
        if not 1 <= dim <= info.dim:
            raise UserError(f"--dims asks for {dim}, but the vectors in {path} have {info.dim} dims")
        if dim not in info.trained_dims:
            warnings.warn(f"{dim} dims were not trained; trained are {list(info.trained_dims)}", stacklevel=2)


def encode_query(image: str, database: VectorFile, run: Path) -> np.ndarray:
    """The image's embedding ``(1, dim)``, as those of the database were made.

    Raises:
        UserError: The image cannot be read, or the model is gone or not the one that made the vectors.
    """
    if not run.is_dir():
        raise UserError(f"the model {run} that made the vectors is not there; say with --run where it is now")
    model = load(run)
    if file_sha256(run / "model.safetensors") != database.info.checkpoint_sha256:
        raise UserError(f"the vectors were made by other weights than those in {run}; embed the images again")
    assert model.info is not None  # load fills it
    images = evaluated_images([image], model.info, torch.device("cpu"), num_workers=0)
    [(batch, _)] = images.eval_batches([np.array([0])])
    with torch.no_grad():
        return model.embed(batch)[:, : database.info.dim].numpy()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m mrl.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--vectors", required=True, metavar="FILE.npy", help="what python -m mrl.embed has written")
    parser.add_argument("--image", required=True, help="the image to find others like")
    parser.add_argument("--dims", type=int, nargs="+", help="prefix sizes; default: the trained ones")
    parser.add_argument("--k", type=int, default=6, help="neighbors at each size; default: 6")
    parser.add_argument("--out", metavar="STEM", help="the figure, without .png; default: neighbors, at the vectors")
    parser.add_argument("--run", help="where the model is now, if it was moved since")
    parser.add_argument("--images", metavar="DIR", help="where the images are now, if they were moved since")
    args = parser.parse_args(argv)
    if args.k < 1:
        raise UserError(f"--k is {args.k}; allowed: 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Search from a command line; returns the exit status."""
    try:
        search(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
