"""Embeddings of a whole split, computed once and kept on disk.

Vectors of a folder of images as three files that any tool reads: vectors.npy, vectors.ids.txt, vectors.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mrl import distributed
from mrl.data.transforms import eval_indices
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.progress import progress
from mrl.rundir import atomic_write, atomic_write_text

Embed = Callable[[Tensor], Tensor]
_MISSING, _FILLED, _NOT_FINITE = 0, 1, 2


@dataclass(frozen=True)
class EmbeddingMetadata:
    """What embeddings are of. Where it is equal they are the same and are used again.

    Attributes:
        checkpoint_sha256: Of the model's weights.
        dataset: Name of the data.
        split: train, val, or the name of other images.
        resize_px: Shorter side of an image after resizing.
        crop_px: Side of its center crop.
        normalization: What is taken from the pixels and what they are divided by, as text.
        flip: Whether the images are mirrored.
        classes_sha256: Of the names of the classes, and of the files' where the data have no other name to go by.
        precision: Arithmetic of the forward pass, "fp32" or "bf16" (autocast); what is stored is float32.
    """

    checkpoint_sha256: str
    dataset: str
    split: str
    resize_px: int
    crop_px: int
    normalization: str
    flip: bool
    classes_sha256: str
    precision: str = "fp32"


@dataclass(frozen=True)
class EmbeddingSet:
    """One row per image, in dataset order.

    Attributes:
        vectors: ``(N, D)`` float32 as the head reads them, not normalized; memory-mapped, read-only.
        labels: ``(N,)`` int64.
        metadata: What they are of.
    """

    vectors: np.ndarray
    labels: np.ndarray
    metadata: EmbeddingMetadata


class Images(Protocol):
    """The part of a split of `mrl.data` that is needed here."""

    labels: Tensor

    def __len__(self) -> int: ...

    def eval_batches(self, rows: Sequence[np.ndarray], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Images on the device, normalized, and their labels, for each array of rows."""
        ...


def embeddings_path(run: Path, split: str, flip: bool = False) -> Path:
    """Where a run directory keeps the embeddings of a split."""
    return run / "embeddings" / (f"{split}_flip" if flip else split)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def classes_sha256(classes: Sequence[str]) -> str:
    """SHA-256 of the class names in their order."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()


def open_embeddings(directory: Path, metadata: EmbeddingMetadata) -> EmbeddingSet | None:
    """The finished embeddings in ``directory``, or None if there are none of exactly this ``metadata``."""
    if _read_metadata(directory / "metadata.json") != metadata:
        return None
    try:
        vectors = np.load(directory / "vectors.npy", mmap_mode="r")
        labels = np.load(directory / "labels.npy")
    except (OSError, ValueError):
        return None
    if vectors.ndim != 2 or len(vectors) != len(labels) or (vectors.dtype, labels.dtype) != (np.float32, np.int64):
        return None
    return EmbeddingSet(vectors, labels, metadata)


def embed_split(
    directory: Path,
    metadata: EmbeddingMetadata,
    images: Images,
    embed: Embed,
    width: int,
    process: Process,
    batch_size: int,
) -> EmbeddingSet:
    """The embeddings of every image, computed by all processes together into ``directory``.

    Each process writes its own rows. A pass that was killed goes on where it stopped, on any number
    of processes and at any batch size; embeddings of other ``metadata`` are made anew. The set
    counts as finished only after every row is known to be filled.

    Args:
        directory: Shared by all processes; see `embeddings_path`.
        metadata: What the embeddings are of; where its ``flip`` is true every image is mirrored first, and its
            ``precision`` is that of ``embed``.
        images: The split, in dataset order.
        embed: Images ``(B, 3, H, W)`` -> embeddings ``(B, D)``; a model in eval mode.
        width: D.
        process: This process.
        batch_size: Images at a time on each process.

    Raises:
        UserError: An embedding holds NaN or infinity; the message names the first such image.
    """
    if process.is_main and open_embeddings(directory, metadata) is None:
        _prepare(directory, metadata, len(images), width)
    distributed.barrier()
    finished = open_embeddings(directory, metadata)
    if finished is None:
        failure = None
        try:
            _fill(directory, images, embed, metadata, process, batch_size)
        except UserError as error:
            failure = error
        # Nobody waits for a process that has met an error: all of them end here.
        [failed] = distributed.all_reduce_any(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise distributed.ElsewhereError(f"another process could not embed its {metadata.split} images")
        _check_filled(directory, images)
        distributed.barrier()
        if process.is_main:
            # The rename is what makes the set count.
            os.replace(directory / "unfinished.json", directory / "metadata.json")
            (directory / "filled.npy").unlink()
        distributed.barrier()
        finished = open_embeddings(directory, metadata)
        if finished is None:
            raise RuntimeError(f"{directory} was changed by something else while it was being written")
    return finished


def _read_metadata(path: Path) -> EmbeddingMetadata | None:
    try:
        return EmbeddingMetadata(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _prepare(directory: Path, metadata: EmbeddingMetadata, num_images: int, width: int) -> None:
    """Files to fill: those of an earlier pass that can go on, or else new ones."""
    (directory / "metadata.json").unlink(missing_ok=True)
    if _read_metadata(directory / "unfinished.json") == metadata:
        with contextlib.suppress(OSError, ValueError):
            vectors, labels, filled = _open_files(directory)
            if vectors.shape == (num_images, width) and labels.shape == filled.shape == (num_images,):
                return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    needed, free = num_images * width * 4, shutil.disk_usage(directory).free
    if needed > free:  # writing to a mapped file on a full disk would kill the process without a word
        raise UserError(
            f"{directory} needs {needed / 2**30:.1f} GiB for embeddings, but {free / 2**30:.1f} GiB are free"
        )
    np.lib.format.open_memmap(directory / "vectors.npy", "w+", np.float32, (num_images, width))
    np.save(directory / "labels.npy", np.full(num_images, -1, dtype=np.int64))
    np.save(directory / "filled.npy", np.full(num_images, _MISSING, dtype=np.uint8))
    atomic_write_text(directory / "unfinished.json", json.dumps(dataclasses.asdict(metadata), indent=2) + "\n")


def _open_files(directory: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, labels and the state of every row, mapped for writing."""
    vectors, labels, filled = (np.load(directory / f"{n}.npy", mmap_mode="r+") for n in ("vectors", "labels", "filled"))
    return vectors, labels, filled


@torch.inference_mode()
def _fill(
    directory: Path, images: Images, embed: Embed, metadata: EmbeddingMetadata, process: Process, batch_size: int
) -> None:
    """Embed the rows of this process that are not filled yet; stops at the first batch that is not finite."""
    vectors, labels, filled = _open_files(directory)
    shares = eval_indices(len(images), batch_size, process.rank, process.world_size)
    rows = [missing for share in shares if len(missing := share[filled[share] != _FILLED])]
    autocast = torch.autocast(process.device.type, torch.bfloat16, enabled=metadata.precision == "bf16")
    with progress(
        show=process.is_main,
        total=sum(map(len, rows)),
        desc=f"{directory.parent.parent.name}: embedding {directory.name}",
        unit="image",
    ) as bar:
        for batch_rows, (batch, batch_labels) in zip(rows, images.eval_batches(rows, metadata.flip), strict=True):
            with autocast:
                z = embed(batch).float().cpu().numpy()
            finite = np.isfinite(z).all(axis=1)
            vectors[batch_rows] = z
            labels[batch_rows] = batch_labels.cpu().numpy()
            # Last, so that a row that counts as filled is filled, whenever the process is killed.
            filled[batch_rows] = np.where(finite, _FILLED, _NOT_FINITE)
            if not finite.all():
                return
            bar.update(len(batch_rows))


def _check_filled(directory: Path, images: Images) -> None:
    """Nothing, if every row holds a finite embedding and the label of its image."""
    vectors, labels, filled = _open_files(directory)
    not_finite, missing = np.flatnonzero(filled == _NOT_FINITE), np.flatnonzero(filled == _MISSING)
    if len(not_finite):
        raise UserError(
            f"the embedding of image {not_finite[0]} ({directory.name} split) holds NaN or infinity, "
            "so the model cannot be evaluated"
        )
    if len(missing):
        raise RuntimeError(f"{len(missing)} of {len(filled)} rows of {directory} were not filled, first {missing[0]}")
    if not np.array_equal(labels, images.labels.numpy()):
        raise RuntimeError(f"the images in {directory} did not come in dataset order: their labels differ")
    vectors.flush()  # type: ignore[attr-defined]


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
    atomic_write(ids_path(path), lambda file: file.write(_lines(ids)))
    os.replace(finished, path)
    atomic_write_text(info_path(path), json.dumps(dataclasses.asdict(info), indent=2) + "\n")


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
