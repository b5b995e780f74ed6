"""Run directories and the embeddings of their images, which every study starts from."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mrl import distributed
from mrl.config import Config, read_config
from mrl.data import build_data
from mrl.data.folder import shown, unicode_name
from mrl.distributed import Process
from mrl.engine import FastForward, good_batch_size
from mrl.errors import UserError
from mrl.matryoshka import NestedLinear, default_nesting_list
from mrl.model import MatryoshkaClassifier, freeze, load
from mrl.results import Source, method_name
from mrl.retrieval.embeddings import (
    EmbeddingMetadata,
    EmbeddingSet,
    alone_in,
    classes_sha256,
    embed_split,
    file_sha256,
    open_embeddings,
)
from mrl.rundir import read_held_out
from mrl.studies.classification import Classifier, truncations
from mrl.training.frozen import CachedImages, Trunk, TrunkCache

if TYPE_CHECKING:
    from mrl.studies.transfer import LabeledFolder, TransferImages

IMAGENET_CLASSES = 1000
# A folder of images gets another name, because figures compare the rows of these data sets to the paper's.
RESERVED_NAMES = ("imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "tiny_imagenet", "digits")


@dataclass(frozen=True)
class OpenedRun:
    """A finished run with its embeddings."""

    directory: Path
    config: Config
    model: MatryoshkaClassifier  # in eval mode, on the CPU
    source: Source  # the shared fields of its rows
    train: EmbeddingSet  # the database of retrieval
    val: EmbeddingSet
    val_flip: EmbeddingSet | None = None  # of mirrored images; None if the run was trained without flips
    transfer: Mapping[str, EmbeddingSet] = field(default_factory=dict)  # of other images by place, see `transfer`
    cut_at: tuple[int, ...] = ()  # sizes of the nested runs that were opened together with this one
    image_classes: tuple[str, ...] = ()  # of the images, if they are not the model's
    _images: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def head(self) -> NestedLinear:
        return self.model.head

    @property
    def classes(self) -> tuple[str, ...]:
        return self.model.info.classes

    @property
    def dims(self) -> tuple[int, ...]:
        """The nesting list, or for a fixed-feature run `cut_at` up to its own size, else the halvings of that."""
        *smaller, own = self.head.nesting_list
        smaller = smaller or [size for size in self.cut_at if size < own]
        return (*smaller, own) if smaller else default_nesting_list(own)

    @property
    def trained_method(self) -> str:
        """Method of the rows of the trained sizes."""
        return method_name(self.head.nesting_list, self.config.head)

    @property
    def method(self) -> str:
        """Method of the rows of `dims`."""
        return self.trained_method if len(self.head.nesting_list) > 1 else "FF truncated"

    @property
    def classifiers(self) -> list[Classifier]:
        """One classifier for each of `dims`."""
        if len(self.head.nesting_list) == 1:
            return truncations(*self.head.weights_and_biases()[0], self.dims)
        return self.head.weights_and_biases()

    def images(self, split: str, indices: np.ndarray) -> Tensor:
        """Return images ``(B, 3, H, W)`` of "train" or "val" as the model reads them."""
        if split not in self._images:
            check_place(self.source.run, self.config)
            cpu, held_out = torch.device("cpu"), read_held_out(self.directory)
            data = replace(self.config.data, num_workers=0)  # a picture is not worth a process
            found = build_data(data, 0, cpu, False, (split,), self.classes, held_out)[split]
            if not np.array_equal(found.labels, (self.train if split == "train" else self.val).labels):
                again = f"embed them: python eval.py --runs {self.directory} --force"
                raise UserError(f"run {self.source.run}: the {split} images have changed since the evaluation; {again}")
            self._images[split] = found
        [(images, _)] = self._images[split].eval_batches([np.asarray(indices)])
        return images

    def pictures(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Return the same images for display: ``(B, H, W, 3)`` in [0, 1]."""
        data = self.config.data
        mean, std = (torch.tensor(value)[:, None, None] for value in (data.mean, data.std))
        return (self.images(split, indices) * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def __str__(self) -> str:
        train, val, number = len(self.train.labels), len(self.val.labels), len(self.image_classes or self.classes)
        trained_on = name = self.source.dataset
        images = f"{train:,} training and {val:,} validation images"
        if self.image_classes:
            trained_on = dataset_name(self.config, len(self.classes))
            images = f"shown are {train:,} images of {name}/train and {val:,} of {name}/val,"
        return (
            f"{self.source.run}: {self.method} of {self.config.model.backbone} on {trained_on}, "
            f"sizes {', '.join(map(str, self.dims))}; {images} of {number:,} classes"
        )


def open_run(
    path: str | Path,
    data_root: str | None = os.environ.get("MRL_DATA_ROOT"),
    title: str | None = os.environ.get("MRL_TITLE"),
) -> OpenedRun:
    """Return the run in directory ``path``, which train.py has finished and eval.py has embedded.

    ``data_root`` is the folder of its images, if they have moved since the training; ``title`` names them in figures.

    Raises:
        UserError: It is not a finished run, or has no embeddings of its current model.
    """
    directory = Path(path)
    config, model = read_run(directory)
    placed = place_images(directory, config, data_root)
    classes = model.info.classes
    source = _source(directory.resolve().name, place_images(directory, config), classes)
    wanted = describe_embeddings(directory, config, source, classes, [])
    found = _on_disk(directory, {place: replace(metadata, precision="bf16") for place, metadata in wanted.items()})
    found |= _on_disk(directory, wanted)
    if missing := [split for split in ("train", "val") if split not in found]:
        raise UserError(
            f"{directory} has no embeddings of its {' and '.join(missing)} images by its present model; "
            f"run: python eval.py --runs {directory}"
        )
    source = replace(source, dataset=title or source.dataset)
    return OpenedRun(directory, placed, model, source, found["train"], found["val"], found.get("val_flip"))


def place_images(run: Path, config: Config, data_root: str | None = None) -> Config:
    """Return ``config`` with the images at ``data_root``, if it is given, or else where the run had them.

    A relative data.root counts from the folder in which the run was trained (its provenance.json), if it is there.
    """
    root = config.data.root
    if data_root is None and root is not None and not Path(root).is_absolute():
        with contextlib.suppress(OSError, ValueError, LookupError):  # made by an older version, or imported
            trained_in = json.loads((run / "provenance.json").read_text())[-1]["folder"]
            if (there := Path(trained_in) / root).is_dir():
                data_root = str(there)
    return config if data_root is None else replace(config, data=replace(config.data, root=data_root))


def check_place(run: str, config: Config) -> None:
    """Check that the images of a run are where its settings say."""
    root = config.data.root
    if root is not None and not Path(root).is_dir():
        raise UserError(
            f"the images of run {run} are not at {root!r} (seen from {os.getcwd()}); give the folder that holds them "
            "now: --data.root DIR (mrl.explore: --images DIR; notebooks: MRL_DATA_ROOT=DIR)"
        )


def read_run(directory: Path) -> tuple[Config, MatryoshkaClassifier]:
    """Return the settings and the model of a finished run, with the image settings that the model expects."""
    config, model = read_config(directory / "config.yaml"), load(directory)
    info: Any = model.info
    data = replace(config.data, exif_rotation=info.exif_rotation, interpolation=info.interpolation)
    return replace(config, data=data), model


def embed_runs(
    runs: Mapping[str, Path],
    transfer: TransferImages,
    batch_size: int | None,
    force: bool,
    process: Process,
    precision: str = "fp32",
    settings: Sequence[str] = (),
) -> list[OpenedRun]:
    """Return opened runs with embeddings of their own and of the ``transfer`` images, computing what is not on disk.

    All processes share the work. With ``force``, everything is computed again. ``settings`` such as ``--data.root DIR``
    tell where the images are now; see `place_images`. If ``batch_size`` is None, the device decides.

    Raises:
        UserError: A run cannot be read, its images or the other ones do not fit it, or an embedding is not finite.
    """
    opened: list[OpenedRun] = []
    classes_of: dict[str, tuple[str, ...]] = {}
    images: dict[str, Any] = {}
    images_are_of: tuple[Any, ...] = ()
    folders = transfer.folders()
    for name, run in runs.items():
        config, model = read_run(run)
        classes = model.info.classes
        source = _source(name, place_images(run, config), classes)  # data keep their name when they move
        if classes_of.setdefault(source.dataset, classes) != classes:
            raise UserError(f"run {name} and an earlier one call their data {source.dataset!r}, but classes differ")
        wanted = describe_embeddings(run, config, source, classes, list(folders.values()), precision)
        given = read_config(run / "config.yaml", settings).data
        moved = any("data.root" in word for word in settings) and given.root != config.data.root
        config = place_images(run, config, given.root if moved else None)
        config = replace(config, data=replace(config.data, num_workers=given.num_workers, backend=given.backend))
        data = config.data
        sets = {} if force else _on_disk(run, wanted)
        lacking = distributed.all_reduce_any(*(place not in sets for place in wanted))  # others may write meanwhile
        missing = [place for place, lacks in zip(wanted, lacking, strict=True) if lacks]
        if moved and process.is_main and not {"train", "val"} <= {*missing}:
            print(f"run {name}: stored embeddings are used, not the images in {data.root}; --force embeds these")
        root = Path(data.root or "")
        trained_on = root / "train" if (root / "train").is_dir() else root
        transfer.check(source.dataset, classes, trained_on if data.root else None)
        splits = tuple(dict.fromkeys(wanted[place].split for place in missing if place not in folders))
        of_images = (data, classes, read_held_out(run))
        if splits and not (of_images == images_are_of and set(splits) <= images.keys()):
            check_place(name, config)
            if data.root != given.root and process.is_main:
                print(f"run {name}: data.root {given.root!r} counts from the folder of its training: {data.root}")
            images = {}  # free the images of the previous run before reading the next
            chosen: dict[str, Any] = {"splits": splits, "classes": classes, "held_out": of_images[2]}
            images = build_data(data, config.run.seed, process.device, process.is_main, **chosen)
            images_are_of = of_images
            for found in images.values():
                if list(found.classes) != list(classes):
                    trained, now = (f"{len(names)} ({shown(names)})" for names in (classes, found.classes))
                    raise UserError(
                        f"run {name} was trained on the classes {trained}, but its data now has {now}; restore the "
                        "data that it was trained on"
                    )
        cache = None
        if missing:
            model.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            if config.train.cache_views:  # runs with the same frozen layers share their outputs
                freeze(model, config.model.trainable)
                cache = TrunkCache(model, config, run.parent / "trunk_cache", precision, process)
        pool = Trunk((cache.tail if cache else model).backbone, whole=True).eval()
        num_images = sum(
            len(folders[place].listed.paths if place in folders else images[wanted[place].split]) for place in missing
        )
        embed = FastForward(pool, num_images, partial(_report, name, process)) if precision == "fp32" else pool
        size = batch_size or good_batch_size(process.device)
        for place in missing:
            split, directory = wanted[place].split, run / "embeddings" / place
            inputs = folder_images(folders[place], config, process) if place in folders else images[split]
            if cache:
                inputs = CachedImages(cache, split, inputs)
                inputs.center(wanted[place].flip)  # first, so that an error ends all processes
            with alone_in(directory, process, force):
                sets[place] = embed_split(directory, wanted[place], inputs, embed, model.width, process, size)
        own = (sets["train"], sets["val"], sets.get("val_flip"))
        opened.append(OpenedRun(run, config, model.cpu(), source, *own, {place: sets[place] for place in folders}))
    nested = sorted({dim for run in opened if len(run.head.nesting_list) > 1 for dim in run.head.nesting_list})
    return [replace(run, cut_at=tuple(nested)) for run in opened]


def _report(run: str, process: Process, engine: str) -> None:
    if process.is_main and engine != "PyTorch":
        tqdm.write(f"{run}: embedding with {engine}")


def dataset_name(config: Config, num_classes: int) -> str:
    """Return data.name, or the folder's own name if that is "folder".

    Only the whole of ImageNet-1K is named "imagenet", because figures show the paper's numbers beside that name.
    """
    data = config.data
    if data.name == "imagenet" and num_classes != IMAGENET_CLASSES:
        return f"imagenet_{num_classes}_classes"
    if data.name != "folder" or data.root is None:
        return data.name
    name = unicode_name(Path(os.path.abspath(data.root)).name)  # a link's own name
    return f"{name}_folder" if name in RESERVED_NAMES else name


def describe_embeddings(
    run: Path,
    config: Config,
    source: Source,
    classes: Sequence[str],
    folders: Sequence[LabeledFolder],
    precision: str = "fp32",
) -> dict[str, EmbeddingMetadata]:
    """Return ``{place: metadata}`` of a run's embeddings; of mirrored images too if it was trained with flips."""
    of_val = EmbeddingMetadata(
        checkpoint_sha256=file_sha256(run / "model.safetensors"),
        dataset=source.dataset,
        split="val",
        resize_px=source.resize_px,
        crop_px=source.crop_px,
        normalization=f"mean {config.data.mean}, std {config.data.std}",
        interpolation=config.data.interpolation,
        flip=False,
        classes_sha256=classes_sha256(classes),
        precision=precision,
    )
    wanted = {split: replace(of_val, split=split) for split in ("train", "val")}
    wanted |= {"val_flip": replace(of_val, flip=True)} if config.data.flip else {}
    for folder in folders:
        # Two folders may have the same name; their files tell them apart.
        files = [str(Path(path).relative_to(folder.path)) for path in folder.listed.paths]
        known_by = classes_sha256([*folder.listed.classes, *files])
        wanted[folder.place] = replace(of_val, dataset=folder.name, split=folder.place, classes_sha256=known_by)
    return wanted


def _source(name: str, config: Config, classes: Sequence[str]) -> Source:
    px = config.data.eval_resize_px, config.data.eval_px
    return Source(dataset_name(config, len(classes)), unicode_name(name), config.run.seed, *px, flip=False)


def _on_disk(run: Path, wanted: Mapping[str, EmbeddingMetadata]) -> dict[str, EmbeddingSet]:
    found = {place: open_embeddings(run / "embeddings" / place, metadata) for place, metadata in wanted.items()}
    return {place: ready for place, ready in found.items() if ready is not None}


def folder_images(folder: LabeledFolder, config: Config, process: Process) -> Any:
    """Return the images of ``folder``, prepared as those that the run is evaluated on."""
    data = replace(config.data, name="folder", root=str(folder.path.parent), backend="folder", num_classes=None)
    data = replace(data, max_unreadable=0.0, val_share=0.0)  # the studies know these images from their own list
    split, classes = folder.path.name, folder.listed.classes
    return build_data(data, config.run.seed, process.device, process.is_main, splits=(split,), classes=classes)[split]
