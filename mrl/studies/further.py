"""Studies of labelled images beside a run's own: robustness, few-shot, and retrieval of or among other images."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from mrl.data.listing import ImageList, list_images
from mrl.errors import UserError
from mrl.nesting import default_nesting_list
from mrl.results import Row, method_name
from mrl.retrieval.embeddings import EmbeddingSet
from mrl.studies.adaptive_retrieval import adaptive_retrieval
from mrl.studies.few_shot import SHOTS, few_shot
from mrl.studies.retrieval import retrieval
from mrl.studies.robustness import OWN_CLASSES, SYNSET_FILES, robustness, trained_classes
from mrl.studies.run import EmbeddedRun

GENERAL_NAMES = ("train", "val", "test", "images", "queries", "database")


@dataclass(frozen=True, eq=False)
class LabelledFolder:
    """Images in a folder per class, which no training has seen.

    Attributes:
        name: What rows call them: imagenet_v2 and so on, or the folder's own name, with that of the folder around it
            where it is as general as "val".
        kind: imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, or "folder" for any others.
        path: The folder that holds the class folders.
        listed: The images.
    """

    name: str
    kind: str
    path: Path
    listed: ImageList

    @property
    def place(self) -> str:
        """Name of the folder that keeps their embeddings, beside those of train and val."""
        return f"images_{self.name}"


@dataclass(frozen=True)
class FurtherImages:
    """Which further images each study takes.

    Attributes:
        robustness: Of classes that the model was trained on.
        few_shot: Of any classes.
        retrieval: Queries to find in the training images, or queries and the database to find them in.
        renaming: ``{class folder: trained class}`` of robustness and of queries, where they are called differently.
    """

    robustness: Sequence[LabelledFolder] = ()
    few_shot: Sequence[LabelledFolder] = ()
    retrieval: Sequence[Sequence[LabelledFolder]] = ()
    renaming: Mapping[str, str] = field(default_factory=dict)

    def folders(self) -> dict[str, LabelledFolder]:
        """``{place: folder}`` of all images, each once.

        Raises:
            UserError: Two different folders have one name, or the same queries are to be found twice.
        """
        queries = [first.name for first, *_ in self.retrieval]
        if len(set(queries)) < len(queries):
            raise UserError(
                f"--retrieval has the queries {', '.join(queries)}; give each once, and other databases later"
            )
        found: dict[str, LabelledFolder] = {}
        for folder in itertools.chain(self.robustness, self.few_shot, *self.retrieval):
            other = found.setdefault(folder.place, folder)
            if other.path != folder.path:
                raise UserError(f"{other.path} and {folder.path} are both called {folder.name!r}; rename a folder")
        return found

    def check(self, dataset: str, classes: Sequence[str], train: Path | None) -> None:
        """Nothing, if the studies fit a run that was trained on ``classes`` of ``dataset``, the images in ``train``.

        Raises:
            UserError: They do not; so nothing is embedded in vain.
        """
        for folder in self.folders().values():
            if folder.name == dataset:
                raise UserError(f"{folder.path} is called {dataset!r}, as the data of the run are; rename the folder")
        for folder in (*self.robustness, *(queries for queries, *database in self.retrieval if not database)):
            trained_classes(folder.kind, folder.listed.classes, classes, self.renaming)
        for queries, *databases in self.retrieval:
            for database in databases:
                places_of(queries, database)
        for folder in self.few_shot:
            if train is not None and train.resolve() == folder.path.resolve():
                raise UserError(f"--few_shot {folder.path}: the run was trained on these; give others")
            counts = folder.listed.labels.bincount()
            if counts.min() < 2:
                lonely = folder.listed.classes[int(counts.argmin())]
                raise UserError(
                    f"--few_shot {folder.path}: class {lonely!r} has one image, so none is left to classify; "
                    "give classes of two or more"
                )


def read_folder(option: str, text: str) -> LabelledFolder:
    """The images that ``NAME=DIR`` or ``DIR`` means on the command line.

    Raises:
        UserError: The name is not a known set's, or the folder is none, or holds no images in class folders.
    """
    kind, equals, path = text.partition("=")
    if not equals:
        kind, path = OWN_CLASSES, text
    if kind not in (*SYNSET_FILES, OWN_CLASSES):
        allowed = ", ".join(f"{name}=DIR" for name in (*SYNSET_FILES, OWN_CLASSES))
        raise UserError(f"{option} {text}: no data set is called {kind!r}; allowed: DIR, {allowed}")
    folder = Path(os.path.abspath(path))
    if not path or not folder.is_dir():
        raise UserError(f"{option} {text}: {path!r} is not a folder; give one that holds a folder of images per class")
    own_name = f"{folder.parent.name}_{folder.name}" if folder.name in GENERAL_NAMES else folder.name
    name = own_name if kind == OWN_CLASSES else kind
    return LabelledFolder(name, kind, folder, list_images(folder.parent, folder.name))


def places_of(queries: LabelledFolder, database: LabelledFolder) -> np.ndarray:
    """The position ``(F,)`` int64 among the database's classes of each of the F classes of the queries.

    Raises:
        UserError: A class of the queries is not in the database, so that its images could never be found.
    """
    position = {name: c for c, name in enumerate(database.listed.classes)}
    missing = [name for name in queries.listed.classes if name not in position]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(queries.listed.classes)} classes of {queries.path} ({', '.join(missing[:3])}) are "
            f"not in {database.path}; allowed are queries of its {len(position)} classes"
        )
    return np.array([position[name] for name in queries.listed.classes], dtype=np.int64)


def further_studies(run: EmbeddedRun, images: FurtherImages, device: torch.device) -> list[Row]:
    """The rows of every study of ``images``, whose embeddings ``run`` holds; their dataset is that of the images.

    Raises:
        UserError: As the studies.
    """
    dims, width = run.head.nesting_list, run.val.vectors.shape[1]
    method = method_name(dims, run.head.tied)
    by_method: dict[str, Sequence[int]] = {method: dims}
    if dims == (width,):
        by_method["FF truncated"] = default_nesting_list(width)
    classifiers = [run.head.weight_and_bias(g) for g in range(len(dims))]
    rows: list[Row] = []
    for folder in images.robustness:
        found, source = run.further[folder.place], replace(run.source, dataset=folder.name)
        trained = trained_classes(folder.kind, folder.listed.classes, run.classes, images.renaming)
        rows += robustness(found.vectors, found.labels, classifiers, trained, source, method, device=device)
    for folder in images.few_shot:
        found, source = run.further[folder.place], replace(run.source, dataset=folder.name)
        shots = fitting_shots(folder.name, found)
        for name, sizes in by_method.items():
            rows += few_shot(found.vectors, found.labels, sizes, source, name, shots=shots, device=device)
    for queries, *databases in images.retrieval:
        found, source = run.further[queries.place], replace(run.source, dataset=queries.name)
        if databases:
            database, places = run.further[databases[0].place], places_of(queries, databases[0])
        else:
            database = run.train
            places = trained_classes(queries.kind, queries.listed.classes, run.classes, images.renaming)
        arrays = (found.vectors, places[found.labels], database.vectors, database.labels)
        rows += retrieval(*arrays, by_method, source, device=device)
        if len(dims) > 1:
            rows += adaptive_retrieval(*arrays, dims, source, method, device=device)
    return rows


def fitting_shots(name: str, images: EmbeddingSet) -> list[int]:
    """Those of the paper's 1, 3, 5, 7, 9 supports that leave every class an image to classify."""
    smallest = int(np.bincount(images.labels).min())
    shots = [n for n in SHOTS if n < smallest]
    if len(shots) < len(SHOTS):
        left_out = ", ".join(str(n) for n in SHOTS if n not in shots)
        warnings.warn(
            f"{name}: the smallest class has {smallest} images, so few-shot with {left_out} is left out", stacklevel=2
        )
    return shots
