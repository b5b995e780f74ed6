"""Vectors of a folder of images as three files that any tool reads: vectors.npy, vectors.ids.txt, vectors.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mrl.errors import UserError
from mrl.files import write_text, write_whole


@dataclass(frozen=True)
class VectorInfo:
    """What the vectors are of: the content of vectors.json.

    Attributes:
        run: Directory of the model that made them.
        checkpoint_sha256: SHA-256 of its weights.
        trained_dims: Prefix sizes that it was trained at.
        dim: Length of a vector.
        images: The folder that the ids are relative to.
        ids_sha256: SHA-256 of the ids, a line each.
    """

    run: str
    checkpoint_sha256: str
    trained_dims: tuple[int, ...]
    dim: int
    images: str
    ids_sha256: str


@dataclass(frozen=True)
class VectorFile:
    """One row per image.

    Attributes:
        vectors: ``(N, dim)`` float32 of length 1; memory-mapped, read-only.
        ids: Paths of the N images, relative to ``info.images``.
        info: What they are of.
    """

    vectors: np.ndarray
    ids: list[str]
    info: VectorInfo


def ids_path(path: Path) -> Path:
    """Where the ids of the vectors in ``path`` are: vectors.ids.txt beside vectors.npy."""
    return path.with_name(f"{path.stem}.ids.txt")


def info_path(path: Path) -> Path:
    """Where the description of the vectors in ``path`` is: vectors.json beside vectors.npy."""
    return path.with_suffix(".json")


def ids_sha256(ids: Sequence[str]) -> str:
    """SHA-256 of ids in their order."""
    return hashlib.sha256(_lines(ids)).hexdigest()


def _lines(ids: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(name) + b"\n" for name in ids)


def write_vectors(finished: Path, path: Path, ids: Sequence[str], info: VectorInfo) -> None:
    """Move the array file ``finished`` to ``path`` and write ids and description beside it."""
    info_path(path).unlink(missing_ok=True)  # first away and last there: it says that the others are whole
    write_whole(ids_path(path), lambda file: file.write(_lines(ids)))
    os.replace(finished, path)
    write_text(info_path(path), json.dumps(dataclasses.asdict(info), indent=2) + "\n")


def open_vectors(path: str | Path) -> VectorFile:
    """The vectors that `write_vectors` wrote.

    Raises:
        UserError: One of the three files is missing or does not fit the others.
    """
    path = Path(path)
    try:
        content = json.loads(info_path(path).read_text(encoding="utf-8"))
        info = VectorInfo(**content | {"trained_dims": tuple(content["trained_dims"])})
        lines = ids_path(path).read_bytes().split(b"\n")[:-1]
        vectors = np.load(path, mmap_mode="r")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read as vectors of python -m mrl.embed: {error}") from error
    ids = [os.fsdecode(line) for line in lines]
    if vectors.dtype != np.float32 or vectors.shape != (len(ids), info.dim) or ids_sha256(ids) != info.ids_sha256:
        raise UserError(
            f"{path} {vectors.shape} and the {len(ids)} ids beside it are not of one pass; run mrl.embed again"
        )
    return VectorFile(vectors, ids, info)
