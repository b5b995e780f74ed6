"""Run directories -> the embeddings of their images, computed once: where every study starts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mrl.config import Config, read_config
from mrl.data import build_data
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.model import load
from mrl.results import Source
from mrl.retrieval.embeddings import (
    EmbeddingMetadata,
    EmbeddingSet,
    classes_sha256,
    embed_split,
    embeddings_path,
    file_sha256,
    open_embeddings,
)
from mrl.studies.opened_run import EmbeddedRun
from mrl.studies.transfer import SYNSET_FILES, LabelledFolder, TransferImages

SPLITS = ("train", "val")
IMAGENET_CLASSES = 1000
RESERVED_NAMES = ("imagenet", "tiny_imagenet", "digits", *SYNSET_FILES)


def embed_runs(
    names: dict[str, Path],
    further: TransferImages,
    batch_size: int,
    force: bool,
    process: Process,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> list[EmbeddedRun]:
    """Every run with the embeddings of its train and val images and of ``further``, computed where not on disk yet.

    Args:
        names: ``{name: run directory}``.
        further: Other images than the run's own.
        batch_size: Images at a time on each process.
        force: Compute also what is on disk.
        process: This process; all of them share the work.
        precision: Arithmetic of the forward pass; see `EmbeddingMetadata`.

    Raises:
        UserError: A run cannot be read, its images or the further ones do not fit it, or an embedding is not finite.
    """
    embedded: list[EmbeddedRun] = []
    classes_of: dict[str, tuple[str, ...]] = {}
    images: dict[str, Any] = {}
    images_are_of: tuple = ()
    folders = further.folders()
    for name, run in names.items():
        config, model = read_config(run / "config.yaml"), load(run)
        data, classes, dataset = config.data, model.info.classes, dataset_name(config, len(model.info.classes))  # type: ignore[union-attr]
        if classes_of.setdefault(dataset, classes) != classes:
            raise UserError(f"run {name} and one before it call their data {dataset!r}, but their classes differ")
        further.check(dataset, classes, Path(data.root) / "train" if data.root else None)
        source = Source(dataset, name, config.run.seed, data.eval_resize_px, data.eval_px, flip=False)
        wanted = describe_embeddings(run, config, source, classes, list(folders.values()), precision)
        sets: dict[str, EmbeddingSet] = {}
        for place, metadata in wanted.items():
            ready = None if force else open_embeddings(run / "embeddings" / place, metadata)
            if ready is not None:
                sets[place] = ready
        missing = [place for place in wanted if place not in sets]
        splits = tuple(dict.fromkeys(wanted[place].split for place in missing if place not in folders))
        if splits:
            key = (data.name, data.root, data.backend, data.eval_resize_px, data.eval_px, data.mean, data.std)
            if key != images_are_of or not set(splits) <= images.keys():
                images = {}  # lets go of the last run's before the next are read
                images = build_data(data, config.run.seed, process.device, process.is_main, splits=splits)
                images_are_of = key
        if missing:
            model.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for place in missing:
            if place in folders:
                of_place = read_images(folders[place], config, process)
            else:
                of_place = images[wanted[place].split]
                refuse_other_classes(name, classes, of_place.classes)
            directory = run / "embeddings" / place
            if force and process.is_main:
                shutil.rmtree(directory, ignore_errors=True)
            sets[place] = embed_split(directory, wanted[place], of_place, model.embed, model.width, process, batch_size)
        of_further = {place: sets[place] for place in folders}
        own = (sets["train"], sets["val"], sets.get("val_flip"))
        embedded.append(EmbeddedRun(source, model.head.cpu(), classes, *own, of_further))
    return embedded


def dataset_name(config: Config, num_classes: int) -> str:
    """What the data of a run are called: data.name, or the folder's own name where that is "folder".

    Only all of ImageNet-1K is called "imagenet", since the paper's numbers are shown beside what is called so.
    """
    data = config.data
    if data.name == "imagenet" and num_classes != IMAGENET_CLASSES:
        return f"imagenet_{num_classes}_classes"
    if data.name != "folder" or data.root is None:
        return data.name
    name = Path(data.root).resolve().name
    return f"{name}_folder" if name in RESERVED_NAMES else name


def describe_embeddings(
    run: Path,
    config: Config,
    source: Source,
    classes: Sequence[str],
    folders: Sequence[LabelledFolder],
    precision: str = "fp32",
) -> dict[str, EmbeddingMetadata]:
    """``{place: metadata}`` of the embeddings that a run's model gives; of mirrored images too if it has seen such."""
    of_val = EmbeddingMetadata(
        checkpoint_sha256=file_sha256(run / "model.safetensors"),
        dataset=source.dataset,
        split="val",
        resize_px=source.resize_px,
        crop_px=source.crop_px,
        normalization=f"mean {config.data.mean}, std {config.data.std}",
        flip=False,
        classes_sha256=classes_sha256(classes),
        precision=precision,
    )
    views = [(split, False) for split in SPLITS] + ([("val", True)] if config.data.flip else [])
    wanted = {embeddings_path(run, split, flip).name: replace(of_val, split=split, flip=flip) for split, flip in views}
    for folder in folders:
        # Of two folders with one name only the files can tell which is meant.
        files = [str(Path(path).relative_to(folder.path)) for path in folder.listed.paths]
        known_by = classes_sha256([*folder.listed.classes, *files])
        wanted[folder.place] = replace(of_val, dataset=folder.name, split=folder.place, classes_sha256=known_by)
    return wanted


def read_images(folder: LabelledFolder, config: Config, process: Process) -> Any:
    """The images of ``folder``, prepared as those that the run is evaluated on."""
    data = replace(config.data, name="folder", root=str(folder.path.parent), backend="folder", num_classes=None)
    split = folder.path.name
    return build_data(data, config.run.seed, process.device, process.is_main, splits=(split,))[split]


def refuse_other_classes(name: str, trained: Sequence[str], found: Sequence[str]) -> None:
    """Nothing, if the images have the classes that the run was trained on, in the same order.

    Raises:
        UserError: They have not.
    """
    if list(trained) != list(found):
        raise UserError(
            f"run {name} was trained on {len(trained)} classes ({', '.join(trained[:3])}, ...), but its data now has "
            f"{len(found)} ({', '.join(found[:3])}, ...); restore the data that it was trained on"
        )
