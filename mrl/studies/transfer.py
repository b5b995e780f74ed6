"""Accuracy on further labeled images whose classes are some of the trained ones (section 5, table 17).

Few-shot classification by the nearest class mean at every prefix (appendix G, table 15).

Studies of labeled images beside a run's own: robustness, few-shot, and retrieval of or among other images.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mrl.data.folder import ImageList, list_images
from mrl.errors import UserError
from mrl.matryoshka import default_nesting_list, unit_prefix
from mrl.progress import progress
from mrl.results import Row, Source, method_name
from mrl.retrieval.embeddings import EmbeddingSet
from mrl.studies.adaptive_classification import std
from mrl.studies.adaptive_retrieval import adaptive_retrieval
from mrl.studies.classification import Classifier, classification
from mrl.studies.retrieval import retrieval
from mrl.studies.run import OpenedRun

STUDY = "robustness"
OWN_CLASSES = "folder"
# The file of class ids that timm keeps for each set.
SYNSET_FILES = {
    "imagenet_v2": "imagenet_synsets.txt",
    "imagenet_a": "imagenet_a_synsets.txt",
    "imagenet_r": "imagenet_r_synsets.txt",
    "imagenet_sketch": "imagenet_synsets.txt",
}


def synsets(name: str) -> list[str]:
    """The WordNet ids of a set's classes, in its order: 200 of imagenet_a and imagenet_r, else ImageNet's 1,000.

    They are timm's own metadata.

    Raises:
        UserError: No set is called ``name``.
    """
    if name not in SYNSET_FILES:
        raise UserError(f"no data set is called {name!r}; allowed: {', '.join([*SYNSET_FILES, OWN_CLASSES])}")
    return (resources.files("timm.data") / "_info" / SYNSET_FILES[name]).read_text(encoding="utf-8").split()


def trained_classes(
    name: str, folders: Sequence[str], classes: Sequence[str], renaming: Mapping[str, str] | None = None
) -> np.ndarray:
    """The trained class ``(F,)`` int64 of each class folder, all different.

    Args:
        name: imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, or "folder" for any other set.
        folders: Names of the set's F class folders. Of imagenet_v2 they may be the numbers 0 to 999.
        classes: Names of the C classes that the model was trained on.
        renaming: Of a "folder", ``{folder: trained class}`` where they are called differently.

    Raises:
        UserError: The name is unknown, a named set has other folders than it should, a folder is not a trained
            class, or two folders are the same one.
    """
    if name == OWN_CLASSES:
        wanted = [(renaming or {}).get(folder, folder) for folder in folders]
    else:
        wanted = _known_folders(name, folders)
    position = {trained: c for c, trained in enumerate(classes)}
    unknown = [folder for folder, trained in zip(folders, wanted, strict=True) if trained not in position]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(folders)} class folders of {name} are no classes of the model "
            f"({', '.join(unknown[:3])}); allowed are its {len(classes)} ({', '.join(classes[:3])}, ...)"
        )
    if not folders or len(set(wanted)) < len(wanted):
        raise UserError(
            f"the {len(folders)} class folders of {name} must be one or more different classes of the model"
        )
    return np.array([position[trained] for trained in wanted], dtype=np.int64)


def _known_folders(name: str, folders: Sequence[str]) -> list[str]:
    """The WordNet id of each folder of a named set."""
    expected = synsets(name)
    if name == "imagenet_v2" and set(folders) == {str(c) for c in range(len(expected))}:
        return [expected[int(folder)] for folder in folders]
    if set(folders) != set(expected) or len(folders) != len(expected):
        raise UserError(
            f"{name} has {len(expected)} class folders ({', '.join(expected[:3])}, ...), but {len(folders)} were found "
            f"({', '.join(folders[:3])}, ...); call a set of other classes {OWN_CLASSES!r}"
        )
    return list(folders)


def robustness(
    vectors: np.ndarray,
    labels: np.ndarray,
    classifiers: Sequence[Classifier],
    trained: np.ndarray,
    source: Source,
    method: str,
    *,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows of top-1 and top-5 at each size, with the logits restricted to the classes of the set before the argmax.

    Args:
        vectors: Embeddings ``(N, D)`` of the set, raw.
        labels: ``(N,)`` int64, positions among its class folders.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of each size, of all trained classes.
        trained: The trained class ``(F,)`` of each folder; see `trained_classes`.
        source: What the rows are of; its dataset is the set's name.
        method: The rows' method.
        device: Where to compute.

    Raises:
        UserError: As `classification`.
    """
    found = classification(vectors, labels, restrict(classifiers, trained), source, method, device=device)
    return [dataclasses.replace(row, study=STUDY) for row in found]


def restrict(classifiers: Sequence[Classifier], classes: np.ndarray) -> list[Classifier]:
    """Weight ``(F, dim)`` and bias ``(F,)`` of each size for F of the classes, in the order of ``classes`` ``(F,)``."""
    rows = torch.from_numpy(classes)
    return [(weight[rows.to(weight.device)], bias[rows.to(bias.device)]) for weight, bias in classifiers]


STUDY_FEW_SHOT = "few_shot"
SHOTS = (1, 3, 5, 7, 9)
NUM_DRAWS = 10


def few_shot(
    vectors: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    source: Source,
    method: str,
    *,
    shots: Sequence[int] = SHOTS,
    num_draws: int = NUM_DRAWS,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows "top_1_<n>_shot" and "top_1_<n>_shot_std": mean and sample standard deviation of accuracy over the draws.

    For each draw, n images of each class are its supports and all others are classified, to the class whose mean of
    unit prefixes has the highest cosine; among equals the lower class. The paper says neither how many draws it
    took nor whether it normalized.

    Args:
        vectors: Embeddings ``(N, D)``, raw, of labeled images that the model was not trained on.
        labels: ``(N,)`` int64.
        dims: Prefix sizes.
        source: What the rows are of.
        method: The rows' method.
        shots: Supports per class.
        num_draws: Random choices of the supports, the same for every model.
        device: Where to compute.

    Raises:
        UserError: There is one class only, a class has no images left beside its supports, or a vector
            holds NaN or infinity; the message names its row.
    """
    classes, index = _check(vectors, labels, shots, num_draws)
    accuracies: dict[tuple[int, int], list[float]] = {}
    total = len(dims) * len(shots) * num_draws
    with progress(total=total, desc=f"{source.run}: few-shot", unit="draw") as bar:
        for dim in dims:
            z = unit_prefix(torch.from_numpy(np.array(vectors[:, :dim], dtype=np.float32)).to(device), dim)
            for n in shots:
                for supports, queries in support_draws(index, n, num_draws):
                    means = _class_means(z, supports, len(classes), n)
                    # Supports are scored too: leaving them out would copy nearly all of the embeddings.
                    chosen = (z @ means.T).argmax(dim=1).cpu().numpy()
                    accuracies.setdefault((n, dim), []).append(float((chosen == index)[queries].mean()))
                    bar.update()
    rows = []
    for (n, dim), found in accuracies.items():
        num_queries = len(vectors) - n * len(classes)
        for suffix, value in (("", statistics.mean(found)), ("_std", std(found))):
            rows.append(source.row(STUDY_FEW_SHOT, method, f"top_1_{n}_shot{suffix}", value, num_queries, dim=dim))
    return rows


def support_draws(labels: np.ndarray, shots: int, num_draws: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of the supports, ``shots`` of each class, and of all other images, for each draw.

    Draw i orders the images the same way for every ``shots``: its 1 support is among its 3.
    """
    for draw in range(num_draws):
        order = np.random.default_rng(draw).permutation(len(labels))
        by_class = order[np.argsort(labels[order], kind="stable")]
        sizes = np.bincount(labels)
        place = np.arange(len(labels)) - np.repeat(sizes.cumsum() - sizes, sizes)
        yield by_class[place < shots], by_class[place >= shots]


def _class_means(z: Tensor, supports: np.ndarray, num_classes: int, shots: int) -> Tensor:
    """Unit vectors ``(C, dim)`` along the mean of each class's supports, which come sorted by class."""
    chosen = z[torch.from_numpy(supports).to(z.device)]
    return unit_prefix(chosen.view(num_classes, shots, -1).mean(dim=1), z.shape[1])


def _check(
    vectors: np.ndarray, labels: np.ndarray, shots: Sequence[int], num_draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """The classes that occur and the position ``(N,)`` of each label among them."""
    if len(vectors) != len(labels) or not shots or min(shots) < 1 or num_draws < 1:
        raise UserError(
            f"few-shot was given {len(vectors)} embeddings, {len(labels)} labels, {list(shots)} shots and {num_draws} "
            "draws; allowed: a label for each embedding, and 1 or more of the others"
        )
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise UserError(f"few-shot classification needs two or more classes; the images have {len(classes)}")
    if counts.min() <= max(shots):
        raise UserError(
            f"class {classes[counts.argmin()]} has {counts.min()} images, so {max(shots)} supports leave none to "
            f"classify; allowed: up to {counts.min() - 1} shots"
        )
    return classes, index


GENERAL_NAMES = ("train", "val", "test", "images", "queries", "database")


@dataclass(frozen=True, eq=False)
class LabeledFolder:
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
class TransferImages:
    """Which further images each study takes.

    Attributes:
        robustness: Of classes that the model was trained on.
        few_shot: Of any classes.
        retrieval: Queries to find in the training images, or queries and the database to find them in.
        renaming: ``{class folder: trained class}`` of robustness and of queries, where they are called differently.
    """

    robustness: Sequence[LabeledFolder] = ()
    few_shot: Sequence[LabeledFolder] = ()
    retrieval: Sequence[Sequence[LabeledFolder]] = ()
    renaming: Mapping[str, str] = field(default_factory=dict)

    def folders(self) -> dict[str, LabeledFolder]:
        """``{place: folder}`` of all images, each once.

        Raises:
            UserError: Two different folders have one name, or the same queries are to be found twice.
        """
        queries = [first.name for first, *_ in self.retrieval]
        if len(set(queries)) < len(queries):
            raise UserError(
                f"--retrieval has the queries {', '.join(queries)}; give each once, and other databases later"
            )
        found: dict[str, LabeledFolder] = {}
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


def read_folder(option: str, text: str) -> LabeledFolder:
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
    return LabeledFolder(name, kind, folder, list_images(folder.parent, folder.name))


def places_of(queries: LabeledFolder, database: LabeledFolder) -> np.ndarray:
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


def transfer_studies(
    run: OpenedRun, images: TransferImages, device: torch.device, max_queries: int | None = None
) -> list[Row]:
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
        found, source = run.transfer[folder.place], replace(run.source, dataset=folder.name)
        trained = trained_classes(folder.kind, folder.listed.classes, run.classes, images.renaming)
        rows += robustness(found.vectors, found.labels, classifiers, trained, source, method, device=device)
    for folder in images.few_shot:
        found, source = run.transfer[folder.place], replace(run.source, dataset=folder.name)
        shots = fitting_shots(folder.name, found)
        for name, sizes in by_method.items():
            rows += few_shot(found.vectors, found.labels, sizes, source, name, shots=shots, device=device)
    for queries, *databases in images.retrieval:
        found, source = run.transfer[queries.place], replace(run.source, dataset=queries.name)
        if databases:
            database, places = run.transfer[databases[0].place], places_of(queries, databases[0])
        else:
            database = run.train
            places = trained_classes(queries.kind, queries.listed.classes, run.classes, images.renaming)
        arrays = (found.vectors, places[found.labels], database.vectors, database.labels)
        rows += retrieval(*arrays, by_method, source, max_queries=max_queries, device=device)
        if len(dims) > 1:
            rows += adaptive_retrieval(*arrays, dims, source, method, max_queries=max_queries, device=device)
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
