"""Embeddings on disk: of a split in a run directory, and of a folder of images (python -m mrl.embed)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mrl import distributed
from mrl.data.images import EvalImages
from mrl.distributed import Process
from mrl.engine import autocast
from mrl.errors import UserError
from mrl.progress import progress
from mrl.rundir import atomic_write, atomic_write_text, hold


@dataclass(frozen=True)
class EmbeddingMetadata:
    """What embeddings were made of and how. Embeddings with equal metadata are equal and are used again."""

    checkpoint_sha256: str  # of the model's weights
    dataset: str  # name of the data, or the folder of the images
    split: str  # train, val, or the name of other images
    resize_px: int  # shorter side after resizing
    crop_px: int  # side of the center crop
    normalization: str  # mean and standard deviation
    flip: bool  # whether the images are mirrored
    classes_sha256: str  # of the class names, or of the image files if the data has no other name
    precision: str = "fp32"  # or "bf16", the arithmetic of the forward pass; vectors are stored as float32
    files_sha256: str = ""  # of the images' sizes and times of change (python -m mrl.embed only)
    run: str = ""  # directory of the model (python -m mrl.embed only)
    trained_dims: list[int] = field(default_factory=list)  # its nesting list (python -m mrl.embed only)
    interpolation: str = "bilinear"  # how the images are resized


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings in dataset order: raw vectors ``(N, D)`` float32, memory-mapped, read-only; labels ``(N,)`` int64."""

    vectors: np.ndarray
    labels: np.ndarray
    metadata: EmbeddingMetadata


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def classes_sha256(names: Sequence[str]) -> str:
    """Return the SHA-256 of class names or file names in their order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def files_sha256(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the sizes of files and the times at which they changed, in their order."""
    stats = [os.stat(path) for path in paths]
    return classes_sha256([f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats])


def open_embeddings(directory: Path, metadata: EmbeddingMetadata) -> EmbeddingSet | None:
    """Return the finished embeddings in ``directory``, or None if there are none with exactly this ``metadata``."""
    if read_metadata(directory / "metadata.json") != metadata:
        return None
    try:
        vectors = np.load(directory / "vectors.npy", mmap_mode="r")
        return EmbeddingSet(vectors, np.load(directory / "labels.npy"), metadata)
    except (OSError, ValueError, EOFError):  # a file is gone or cut short
        return None


@contextlib.contextmanager
def alone_in(directory: Path, process: Process, force: bool = False) -> Iterator[None]:
    """Wait while another command computes ``directory``, and keep others from it; with ``force``, forget what it holds.

    An empty folder is removed in the end.
    """
    with contextlib.ExitStack() as held:
        while process.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                folder = held.enter_context(hold(directory, f"waiting for another process that computes {directory}"))
                if os.fstat(folder).st_ino == directory.stat().st_ino:  # not removed by the one that had it
                    break
        for name in ("metadata.json", "unfinished.json") if force and process.is_main else ():
            (directory / name).unlink(missing_ok=True)
        distributed.barrier()
        try:
            yield
            distributed.barrier()  # the others may still read what the next command removes
        finally:
            if process.is_main:
                with contextlib.suppress(OSError):
                    directory.rmdir()


def embed_split(
    directory: Path,
    metadata: EmbeddingMetadata,
    images: EvalImages,
    embed: Callable[[Tensor], Tensor],
    width: int,
    process: Process,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> EmbeddingSet:
    """Return the embeddings of every image, computed by all processes together into ``directory``, which they share.

    The caller holds it with `alone_in`. Each process appends the embeddings of consecutive images to a file of its own,
    a part, and the main process joins the parts in the end. A stopped pass continues with the images that no part has,
    at any number of processes and any batch size. Embeddings with other ``metadata`` or ``width`` are computed again.

    Args:
        metadata: Its ``flip`` and ``precision`` are applied here.
        embed: Images ``(B, 3, H, W)`` -> embeddings ``(B, width)``; a model in eval mode.
        batch_size: Images at a time on each process.
        dtype: In which they are stored; bfloat16 as int16, because numpy has no such type.

    Raises:
        UserError: An embedding holds NaN or infinity, or the disk has too little space.
    """
    parts = _Parts(directory, len(images), width, dtype)
    finished = open_embeddings(directory, metadata)
    [missing] = distributed.all_reduce_any(finished is None or finished.vectors.shape[1] != width)
    if finished is not None and not missing:
        return finished
    if process.is_main:
        parts.prepare(metadata)
    distributed.barrier()
    is_missing = torch.zeros(len(images), dtype=torch.int32)
    if process.is_main:  # the others may see an old listing on a network disk
        is_missing[parts.missing()] = 1
    share = np.array_split(np.flatnonzero(distributed.all_reduce_sum(is_missing)), process.world_size)[process.rank]
    failure = None
    try:
        _embed_share(share, parts, metadata, images, embed, process, batch_size)
    except UserError as error:
        failure = error
    [failed] = distributed.all_reduce_any(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise distributed.ElsewhereError(f"another process could not embed its {metadata.split} images")
    if process.is_main:
        parts.join()
        np.save(directory / "labels.npy", images.labels.numpy())
        os.replace(directory / "unfinished.json", directory / "metadata.json")  # from here on it is finished
    distributed.barrier()
    finished = open_embeddings(directory, metadata)
    assert finished is not None
    distributed.barrier()  # the main process may move the files
    return finished


class _Parts:
    """Files of consecutive vectors, named by the index of the first; the size of a file tells how many it holds.

    Each begins with the header of the whole vectors.npy, which the first becomes when the others are appended to it.
    A process that is killed leaves at most an incomplete last row.
    """

    def __init__(self, directory: Path, num_images: int, width: int, dtype: torch.dtype) -> None:
        self.directory, self.num_images, self.dtype = directory, num_images, dtype
        self.row_bytes = dtype.itemsize * width
        header = io.BytesIO()
        number = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2"}[dtype]
        shape = {"descr": number, "fortran_order": False, "shape": (num_images, width)}
        np.lib.format.write_array_header_1_0(header, shape)
        self.header = header.getvalue()

    def listed(self) -> list[tuple[int, int, Path]]:
        """Return first index, number of whole rows and path of each part, in order."""
        paths = sorted(self.directory.glob("part-*"))
        sizes = [(path.stat().st_size - len(self.header)) // self.row_bytes for path in paths]
        return [(int(path.name[5:]), size, path) for path, size in zip(paths, sizes, strict=True)]

    def missing(self) -> np.ndarray:
        """Return the indices that no part holds."""
        done = np.zeros(self.num_images, dtype=bool)
        for first, size, _ in self.listed():
            done[first : first + size] = True
        return np.flatnonzero(~done)

    def prepare(self, metadata: EmbeddingMetadata) -> None:
        """Remove what does not belong to this pass, and check that the rest fits on the disk."""
        (self.directory / "metadata.json").unlink(missing_ok=True)
        if read_metadata(self.directory / "unfinished.json") != metadata:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                path.unlink()
            _write_metadata(self.directory / "unfinished.json", metadata)
        for _, size, path in self.listed():
            with path.open("rb") as part:
                same_shape = part.read(len(self.header)) == self.header
            if same_shape and size > 0:
                os.truncate(path, len(self.header) + size * self.row_bytes)
            else:
                path.unlink()
        needed, free = len(self.missing()) * self.row_bytes, shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(
                f"{self.directory} needs {needed / 2**30:.1f} GiB for embeddings, but {free / 2**30:.1f} GiB are free"
            )

    def append(self, first: int, vectors: Tensor) -> None:
        """Append vectors to the part that begins at index ``first``."""
        with (self.directory / f"part-{first:012d}").open("ab") as part:
            part.write((b"" if part.tell() else self.header) + vectors.contiguous().view(torch.uint8).numpy().tobytes())

    def join(self) -> None:
        """Append all parts to the first, which becomes vectors.npy."""
        for _ in range(100):
            if not len(self.missing()):
                break
            time.sleep(1)  # a network disk may show the files of other machines late
        (_, end, joined), *others = self.listed()
        with joined.open("ab") as file:
            for first, size, path in others:
                with path.open("rb") as part:
                    part.seek(len(self.header) + (end - first) * self.row_bytes)  # past what a killed join has copied
                    shutil.copyfileobj(part, file, 2**22)
                file.flush()
                path.unlink()
                end = max(end, first + size)
        os.replace(joined, self.directory / "vectors.npy")


@torch.inference_mode()
def _embed_share(
    share: np.ndarray,
    parts: _Parts,
    metadata: EmbeddingMetadata,
    images: EvalImages,
    embed: Callable[[Tensor], Tensor],
    process: Process,
    batch_size: int,
) -> None:
    """Embed the images ``share``, ascending indices, one part for each run of consecutive ones."""
    runs = np.split(share, np.flatnonzero(np.diff(share) != 1) + 1)
    batches = [(int(run[0]), run[i : i + batch_size]) for run in runs for i in range(0, len(run), batch_size)]
    read = images.eval_batches([indices for _, indices in batches], metadata.flip)
    name = f"embedding {'/'.join(parts.directory.parts[-3:])}"
    with progress(show=process.is_main, total=len(share), desc=name, unit="image") as bar:
        for (first, indices), (batch, _) in zip(batches, read, strict=True):
            with autocast(process.device, metadata.precision):
                z = embed(batch).to(parts.dtype).cpu()
            finite = z.isfinite().all(dim=1).numpy()
            if not finite.all():
                raise UserError(
                    f"the embedding of image {indices[~finite][0]} ({metadata.split} split) holds NaN or infinity, "
                    "so the model cannot be evaluated"
                )
            parts.append(first, z)
            bar.update(len(indices))


def read_metadata(path: Path) -> EmbeddingMetadata | None:
    """Return the metadata in a JSON file, or None if it holds none."""
    try:
        return EmbeddingMetadata(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write_metadata(path: Path, metadata: EmbeddingMetadata) -> None:
    atomic_write_text(path, json.dumps(dataclasses.asdict(metadata), indent=2) + "\n")


@dataclass(frozen=True)
class VectorFile:
    """Vectors ``(N, dim)`` float32 of length 1, memory-mapped, read-only, and their image files below the dataset."""

    vectors: np.ndarray
    ids: list[str]
    metadata: EmbeddingMetadata

    def folder(self, moved_to: str | None) -> Path:
        """Return the folder of the images: ``moved_to``, or else where they were when they were embedded."""
        folder = Path(moved_to or self.metadata.dataset)
        if not folder.is_dir():
            raise UserError(f"the images are not in {folder}; give the folder that holds them now: --images DIR")
        return folder


def write_vectors(finished: Path, path: Path, ids: Sequence[str], metadata: EmbeddingMetadata) -> None:
    """Move the array file ``finished`` to ``path`` (x.npy) and write x.ids.txt and x.json beside it."""
    path.with_suffix(".json").unlink(missing_ok=True)  # while it is missing, the vectors do not count
    lines = b"".join(os.fsencode(name) + b"\n" for name in ids)
    atomic_write(path.with_suffix(".ids.txt"), lambda file: file.write(lines))
    os.replace(finished, path)
    _write_metadata(path.with_suffix(".json"), metadata)


def open_vectors(path: str | Path) -> VectorFile:
    """Return the vectors that ``python -m mrl.embed`` wrote.

    Raises:
        UserError: One of the three files is missing or does not fit the others.
    """
    path = Path(path)
    metadata = read_metadata(path.with_suffix(".json"))
    try:
        lines = path.with_suffix(".ids.txt").read_bytes().split(b"\n")[:-1]
        vectors = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as vectors of python -m mrl.embed: {error}") from error
    ids = [os.fsdecode(line) for line in lines]
    if metadata is None or len(vectors) != len(ids) or classes_sha256(ids) != metadata.classes_sha256:
        raise UserError(f"{path}, its .ids.txt and its .json do not belong together; run python -m mrl.embed again")
    return VectorFile(vectors, ids, metadata)


def folder_of(name: str) -> str:
    """Return the name of the folder that holds an image of a `VectorFile`, often its class; "" at the top.

    >>> folder_of("train/cat/1.jpg")
    'cat'
    """
    return Path(name).parent.name
