"""Images other than the run's own: robustness (section 5, table 17), few-shot (appendix G, table 15) and retrieval."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from mrl.data.folder import ImageList, list_images, shown, unicode_name
from mrl.distributed import Process
from mrl.engine import FastForward
from mrl.errors import UserError
from mrl.matryoshka import unit_prefix
from mrl.progress import progress
from mrl.results import Row, Source
from mrl.retrieval.embeddings import alone_in, embed_split
from mrl.studies.adaptive_retrieval import adaptive_retrieval
from mrl.studies.classification import Classifier, classification
from mrl.studies.retrieval import retrieval
from mrl.studies.run import OpenedRun, describe_embeddings, folder_images
from mrl.training.frozen import Trunk

# timm's files of the class ids of each set.
SYNSET_FILES = {
    "imagenet_v2": "imagenet_synsets.txt",
    "imagenet_a": "imagenet_a_synsets.txt",
    "imagenet_r": "imagenet_r_synsets.txt",
    "imagenet_sketch": "imagenet_synsets.txt",
}
OTHER = "folder"
GENERAL_NAMES = ("train", "val", "test", "images", "queries", "database")
SHOTS = (1, 3, 5, 7, 9)


def synsets(name: str) -> list[str]:
    """Return the WordNet ids of the classes of one of `SYNSET_FILES`, in its order."""
    return (resources.files("timm.data") / "_info" / SYNSET_FILES[name]).read_text(encoding="utf-8").split()


@dataclass(frozen=True, eq=False)
class LabeledFolder:
    """A folder with a folder of images per class, none of which was used in training."""

    name: str  # dataset name in rows: imagenet_v2 etc., or the folder's own name, with its parent's if too general
    kind: str  # one of SYNSET_FILES, or "folder" for any other images
    path: Path  # holds the class folders
    listed: ImageList

    @property
    def place(self) -> str:
        """Name of the folder for its embeddings, beside train and val."""
        return f"images_{self.name}"

    def class_names(self, renaming: Mapping[str, str]) -> list[str]:
        """Return the names of the classes for a model: WordNet ids of a known set, else the folders' names, renamed."""
        folders = self.listed.classes
        if self.kind == OTHER:
            return [renaming.get(folder, folder) for folder in folders]
        expected = synsets(self.kind)
        if self.kind == "imagenet_v2" and set(folders) == set(map(str, range(len(expected)))):
            return [expected[int(folder)] for folder in folders]
        if set(folders) != set(expected):
            raise UserError(
                f"{self.kind} has {len(expected)} class folders ({shown(expected)}), but {self.path} has "
                f"{len(folders)} ({shown(folders)}); give other images without {self.kind}="
            )
        return folders


def read_folder(option: str, text: str) -> LabeledFolder:
    """List the images of ``NAME=DIR`` or ``DIR`` on the command line.

    Raises:
        UserError: The name is unknown, or the folder is missing or holds no class folders with images.
    """
    kind, path = text.split("=", 1) if "=" in text else (OTHER, text)
    if kind not in (*SYNSET_FILES, OTHER):
        allowed = ", ".join(f"{name}=DIR" for name in (*SYNSET_FILES, OTHER))
        raise UserError(f"{option} {text}: no dataset is called {kind!r}; allowed: DIR, {allowed}")
    folder = Path(os.path.abspath(path))
    if not path or not folder.is_dir():
        raise UserError(f"{option} {text}: {path!r} is not a folder; give one that holds a folder of images per class")
    own_name = f"{folder.parent.name}_{folder.name}" if folder.name in GENERAL_NAMES else folder.name
    name = unicode_name(own_name) if kind == OTHER else kind
    return LabeledFolder(name, kind, folder, list_images(folder.parent, folder.name))


@dataclass(frozen=True)
class TransferImages:
    """The images of each study."""

    robustness: Sequence[LabeledFolder] = ()  # of trained classes
    few_shot: Sequence[LabeledFolder] = ()  # of any classes
    retrieval: Sequence[Sequence[LabeledFolder]] = ()  # queries in the training images, or queries and a database
    renaming: Mapping[str, str] = field(default_factory=dict)  # {class folder: trained class}

    def folders(self) -> dict[str, LabeledFolder]:
        """Return all images as ``{place: folder}``."""
        queries = [first.name for first, *_ in self.retrieval]
        if len(set(queries)) < len(queries):
            raise UserError(f"--retrieval has the queries {', '.join(queries)}; give each only once per evaluation")
        found: dict[str, LabeledFolder] = {}
        for folder in itertools.chain(self.robustness, self.few_shot, *self.retrieval):
            other = found.setdefault(folder.place, folder)
            if other.path != folder.path:
                raise UserError(f"{other.path} and {folder.path} are both called {folder.name!r}; rename a folder")
        return found

    def check(self, dataset: str, classes: Sequence[str], train: Path | None) -> None:
        """Check that the images fit a run trained on ``classes`` of ``dataset``, before anything is embedded."""
        for folder in self.folders().values():
            if folder.name == dataset:
                raise UserError(f"{folder.path} has the name of the run's data, {dataset!r}; rename the folder")
        for folder, *database in [[folder] for folder in self.robustness] + list(self.retrieval):
            self.class_indices(folder, database, classes)
        known = [(folder, train) for folder in (*self.robustness, *self.few_shot)]
        known += [(queries, database[0].path if database else train) for queries, *database in self.retrieval]
        for folder, images in known:
            if images is not None and images.resolve() == folder.path.resolve():
                why = "the run was trained on these images" if images == train else "each query would find itself"
                raise UserError(f"{folder.path}: {why}; give others")
        for folder in self.few_shot:
            counts = folder.listed.labels.bincount()
            if len(counts) < 2 or counts.min() < 2:
                raise UserError(
                    f"--few_shot {folder.path}: it has {len(counts)} classes, the smallest with {counts.min()} images; "
                    "give two or more classes of two or more images"
                )

    def class_indices(
        self, folder: LabeledFolder, database: Sequence[LabeledFolder], classes: Sequence[str]
    ) -> np.ndarray:
        """Return the class ``(F,)`` int64 of each class folder, in the ``database`` or else among ``classes``."""
        if database:
            names, classes, owner = folder.listed.classes, database[0].listed.classes, str(database[0].path)
        else:
            names, owner = folder.class_names(self.renaming), "the model"
        index = {name: c for c, name in enumerate(classes)}
        unknown = [name for name in names if name not in index]
        if unknown:
            raise UserError(
                f"{len(unknown)} of {len(names)} classes of {folder.path} ({shown(unknown)}) are not among the "
                f"{len(classes)} classes of {owner} ({shown(classes)})"
            )
        if len(set(names)) < len(names):
            raise UserError(f"two class folders of {folder.path} are the same class of {owner}; rename one of them")
        return np.array([index[name] for name in names], dtype=np.int64)


def transfer_studies(
    run: OpenedRun, images: TransferImages, device: torch.device, max_queries: int | None = None
) -> list[Row]:
    """Return the rows of every study of ``images``, whose embeddings ``run`` holds; ``max_queries`` as `retrieval`."""
    dims, width = run.head.nesting_list, run.val.vectors.shape[1]
    method = run.trained_method
    by_method: dict[str, Sequence[int]] = {method: dims}
    if dims == (width,):
        by_method["FF truncated"] = run.dims
    classifiers = run.head.weights_and_biases()
    rows: list[Row] = []
    for folder in images.robustness:
        found, source = run.transfer[folder.place], replace(run.source, dataset=folder.name)
        trained = restrict(classifiers, images.class_indices(folder, [], run.classes))
        of_set = classification(found.vectors, found.labels, trained, source, method, device=device)
        rows += [replace(row, study="robustness") for row in of_set]
    for folder in images.few_shot:
        found, source = run.transfer[folder.place], replace(run.source, dataset=folder.name)
        for name, sizes in by_method.items():
            rows += few_shot(found.vectors, found.labels, sizes, source, name, device=device)
    for queries, *databases in images.retrieval:
        found, source = run.transfer[queries.place], replace(run.source, dataset=queries.name)
        database = run.transfer[databases[0].place] if databases else run.train
        labels = images.class_indices(queries, databases, run.classes)[found.labels]
        arrays = (found.vectors, labels, database.vectors, database.labels)
        rows += retrieval(*arrays, by_method, source, max_queries=max_queries, device=device)
        if len(dims) > 1:
            rows += adaptive_retrieval(*arrays, dims, source, method, max_queries=max_queries, device=device)
    return rows


def with_images(run: OpenedRun, root: str | None = os.environ.get("MRL_PICTURES")) -> OpenedRun:
    """Return ``run`` with the images in ``root/train`` and ``root/val`` in place of its own, for pictures.

    They may be of any classes. Their embeddings are computed if the run directory does not have them yet.
    """
    if root is None:
        return run
    folders = {split: read_folder("MRL_PICTURES", str(Path(root) / split)) for split in ("train", "val")}
    wanted = describe_embeddings(run.directory, run.config, run.source, run.classes, [*folders.values()])
    alone = Process(0, 1, torch.device("cpu"))
    number = sum(len(folder.listed.paths) for folder in folders.values())
    embed = FastForward(Trunk(run.model.backbone, whole=True).eval(), number, lambda _: None)
    images = {split: folder_images(folder, run.config, alone) for split, folder in folders.items()}
    if images["train"].classes != images["val"].classes:
        raise UserError(f"{root}/train and {root}/val hold different classes; give both the same class folders")
    sets = {}
    for split, folder in folders.items():
        directory, metadata = run.directory / "embeddings" / folder.place, wanted[folder.place]
        with alone_in(directory, alone):
            sets[split] = embed_split(directory, metadata, images[split], embed, run.model.width, alone, batch_size=64)
    source, classes = replace(run.source, dataset=Path(root).resolve().name), tuple(images["val"].classes)
    own = replace(run, train=sets["train"], val=sets["val"], val_flip=None)
    return replace(own, source=source, image_classes=classes, _images=images)


def restrict(classifiers: Sequence[Classifier], classes: np.ndarray) -> list[Classifier]:
    """Return the classifiers of ``classes`` ``(F,)`` alone, in that order: weight ``(F, dim)`` and bias ``(F,)``."""
    return [(weight[classes], bias[classes]) for weight, bias in classifiers]


def few_shot(
    vectors: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    source: Source,
    method: str,
    *,
    shots: Sequence[int] = SHOTS,
    num_splits: int = 10,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Return rows "top_1_<n>_shot" and "top_1_<n>_shot_std": mean and sample standard deviation over random splits.

    Each split takes n images of each class as supports and classifies all others, to the class whose mean of unit
    prefixes has the highest cosine; of equal ones, the lowest class. The splits are the same for every model. The
    paper gives neither their number nor whether it normalized. Shots that leave a class no image are left out, with a
    warning.
    """
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    fitting = [n for n in shots if n < counts.min()]
    if left_out := [str(n) for n in shots if n not in fitting]:
        warnings.warn(
            f"{source.dataset}: the smallest class has {counts.min()} images, so few-shot with {', '.join(left_out)} "
            "is left out",
            stacklevel=2,
        )
    rows = []
    with progress(total=len(dims) * len(fitting), desc=f"{source.run}: few-shot", unit="setting") as bar:
        for dim in dims:
            z = unit_prefix(torch.from_numpy(np.array(vectors[:, :dim])).to(device), dim)
            for n in fitting:
                accuracies = []
                for supports, queries in support_splits(index, n, num_splits):
                    means = unit_prefix(z[supports].view(len(classes), n, dim).mean(dim=1), dim)
                    # All images are scored: z without the supports would be a copy of nearly everything.
                    chosen = (z @ means.T).argmax(dim=1).numpy(force=True)
                    accuracies.append((chosen == index)[queries].mean())
                bar.update()
                for suffix, value in (("", np.mean(accuracies)), ("_std", np.std(accuracies, ddof=1))):
                    metric, num_queries = f"top_1_{n}_shot{suffix}", len(labels) - n * len(classes)
                    rows.append(source.row("few_shot", method, metric, float(value), num_queries, dim=dim))
    return rows


def support_splits(labels: np.ndarray, shots: int, num_splits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the indices of the supports, ``shots`` of each class and sorted by class, and of all other images.

    Split i has the same order of images for every ``shots``: its 1 support is among its 3.
    """
    sizes = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(sizes.cumsum() - sizes, sizes)
    for seed in range(num_splits):
        order = np.random.default_rng(seed).permutation(len(labels))
        by_class = order[np.argsort(labels[order], kind="stable")]
        yield by_class[rank < shots], by_class[rank >= shots]
