"""Tables that say something of each class: its superclass, or what it is called elsewhere.

Accuracy over superclasses and single classes at every prefix (appendix J, tables 24 and 25, figures 10 to 12).

What a prefix knows: groups of classes and classes, who is taken for whom, and which classes need more dims.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mrl.errors import UserError
from mrl.matryoshka import unit_prefix
from mrl.paper import paper_superclasses
from mrl.results import Row, Source
from mrl.retrieval.search import exact_search
from mrl.studies.classification import Classifier, classification
from mrl.studies.transfer import restrict, synsets


def read_class_table(path: str | Path, column: str) -> dict[str, str]:
    """``{class: its entry in column}`` of a tab-separated table whose first line names its columns.

    The first column is the class as its folder is called.

    Raises:
        UserError: The file is missing, lacks the column, or a class has no entry or two different ones.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a table whose columns are the class and its {column}")
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)) or [[]]
    if column not in header[1:]:
        raise UserError(f"{path} has the columns {header}; needed are the class first and one called {column}")
    position = header.index(column, 1)
    table: dict[str, str] = {}
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        entry = line[position].strip() if len(line) > position else ""
        if not entry or table.setdefault(line[0], entry) != entry:
            raise UserError(f"{path}, line {number}: {line[0]!r} needs one {column}, and the same wherever it stands")
    return table


STUDY, CLASS_STUDY = "hierarchy", "per_class"
OUTSIDE = -1
IN, WITHIN, OF_CLASS = "top_1 in ", "top_1 within ", "top_1 of class "
# The first two and "no clear trend" are the paper's appendix J with the rest of what can happen named too.
TRENDS = ("monotone", "rise then dip", "dip then rise", "falling", "no clear trend")


class Hierarchy(NamedTuple):
    """Which superclass each class belongs to.

    Attributes:
        superclass_of: ``(C,)`` int64, positions in ``names``; -1 where the table does not hold the class.
        names: Of the superclasses that occur, sorted.
    """

    superclass_of: np.ndarray
    names: tuple[str, ...]


def default_superclasses(classes: Sequence[str]) -> dict[str, str] | None:
    """The paper's 30 superclasses where ``classes`` are the WordNet ids of ImageNet's 1,000; else None."""
    return paper_superclasses() if set(classes) == set(synsets("imagenet_v2")) else None


def build_hierarchy(classes: Sequence[str], table: Mapping[str, str]) -> Hierarchy:
    """The superclass of each of ``classes``; a class that ``table`` lacks is outside.

    Raises:
        UserError: The table holds none of the classes.
    """
    names = tuple(sorted({table[name] for name in classes if name in table}))
    if not names:
        raise UserError(
            f"none of the {len(classes)} classes ({', '.join(classes[:3])}, ...) is in the superclass table"
        )
    position = {name: i for i, name in enumerate(names)}
    of_class = [position[table[name]] if name in table else OUTSIDE for name in classes]
    return Hierarchy(np.array(of_class, dtype=np.int64), names)


def hierarchy(
    predictions: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    superclasses: Hierarchy,
    source: Source,
    method: str,
) -> list[Row]:
    """Rows of accuracy over superclasses at each size.

    Metrics:

    - "superclass_top_1": images whose class has a superclass; right when the predicted class has the same one. A
      prediction outside the table is wrong.
    - "superclass_top_1_with_reject": all images; the classes outside are one more superclass (the paper's 31st).
      Left out where no class is outside, for it would be the same.
    - "top_1 in <superclass>": the class itself is right, of the images of this superclass.
    - "superclass_top_1 in <superclass>": the superclass is right, of the same images.

    Args:
        predictions: Classes ``(G, N)`` int64, smallest size first.
        labels: ``(N,)`` int64.
        dims: G prefix sizes.
        superclasses: See `build_hierarchy`.
        source: What the rows are of.
        method: The rows' method.

    Raises:
        UserError: The shapes do not fit each other, or no image has a superclass.
    """
    truth, predicted = superclasses.superclass_of[labels], superclasses.superclass_of[predictions]
    inside = truth != OUTSIDE
    if not inside.any():
        raise UserError(f"{source.run}: none of the {len(labels)} images has a class of the superclass table")
    groups: dict[tuple[str, str | None], np.ndarray] = {("superclass_top_1", None): inside}
    if (superclasses.superclass_of == OUTSIDE).any():
        groups["superclass_top_1_with_reject", None] = np.ones_like(inside)
    groups |= {("superclass_top_1", name): truth == i for i, name in enumerate(superclasses.names)}
    rows = _rows(predicted == truth, dims, groups, source, method)
    within: dict[tuple[str, str | None], np.ndarray] = {
        ("top_1", name): truth == i for i, name in enumerate(superclasses.names)
    }
    return rows + _rows(predictions == labels, dims, within, source, method)


def within_superclasses(
    vectors: np.ndarray,
    labels: np.ndarray,
    classifiers: Sequence[Classifier],
    superclasses: Hierarchy,
    source: Source,
    method: str,
    *,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows "top_1 within <superclass>" at each size: its images, told apart among its classes alone (figure 11).

    So the superclass is given, and logits of other classes do not count. Superclasses of one class have no rows,
    for there is nothing to tell apart.

    Args:
        vectors: Embeddings ``(N, D)``, raw.
        labels: ``(N,)`` int64.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of each size.
        superclasses: See `build_hierarchy`.
        source: What the rows are of.
        method: The rows' method.
        device: Where to compute.

    Raises:
        UserError: As `classification`.
    """
    rows: list[Row] = []
    for i, name in enumerate(superclasses.names):
        members = np.flatnonzero(superclasses.superclass_of == i)
        images = np.flatnonzero(superclasses.superclass_of[labels] == i)
        if len(members) > 1 and len(images):
            own = np.searchsorted(members, labels[images])
            restricted = restrict(classifiers, members)
            found = classification(vectors[images], own, restricted, source, method, device=device)
            rows += [
                replace(row, study=STUDY, metric="top_1_within", group=name) for row in found if row.metric == "top_1"
            ]
    return rows


def per_class(
    predictions: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    classes: Sequence[str],
    source: Source,
    method: str,
) -> list[Row]:
    """Rows of each class's accuracy at each size, "top_1 of class <name>", and of how many classes follow which trend.

    A trend is what accuracy does as the size grows: "monotone" (never falls), "falling" (never rises, and falls),
    "rise then dip", "dip then rise" (one turn), or "no clear trend" (several). Its row "classes that are <trend>"
    is a share of the classes that have images. Classes without images have no rows, and one size has no trend.

    Args:
        predictions: Classes ``(G, N)`` int64, smallest size first.
        labels: ``(N,)`` int64.
        dims: G prefix sizes.
        classes: C names.
        source: What the rows are of.
        method: The rows' method.

    Raises:
        UserError: The shapes do not fit each other, or there are no images.
    """
    correct, counts = class_counts(predictions, labels, len(classes))
    rows = []
    for c in np.flatnonzero(counts).tolist():
        for g, dim in enumerate(dims):
            share, n = correct[g, c] / counts[c], int(counts[c])
            rows.append(source.row(CLASS_STUDY, method, "top_1", float(share), n, dim=dim, group=classes[c]))
    if len(dims) == 1:
        return rows
    found = [trend(correct[:, c]) for c in np.flatnonzero(counts)]
    rows += [
        source.row(CLASS_STUDY, method, "share_of_classes", found.count(name) / len(found), len(found), group=name)
        for name in TRENDS
    ]
    return rows


def class_counts(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Right predictions ``(G, C)`` and images ``(C,)`` of each class."""
    counts = np.bincount(labels, minlength=num_classes)
    correct = [np.bincount(labels[of_size == labels], minlength=num_classes) for of_size in predictions]
    return np.array(correct), counts


def trend(values: Sequence[float] | np.ndarray) -> str:
    """Which of `TRENDS` a sequence follows; steps of 0 do not count, and a constant one is monotone."""
    steps = np.sign(np.diff(np.asarray(values)))
    steps = steps[steps != 0]
    if not (steps < 0).any():
        return "monotone"
    if not (steps > 0).any():
        return "falling"
    if (np.diff(steps) != 0).sum() > 1:
        return "no clear trend"
    return "rise then dip" if steps[0] > 0 else "dip then rise"


def _rows(
    right: np.ndarray,
    dims: Sequence[int],
    groups: Mapping[tuple[str, str | None], np.ndarray],
    source: Source,
    method: str,
) -> list[Row]:
    """The share of ``right`` ``(G, N)`` in each group of images, given as masks ``(N,)``; empty groups have no rows."""
    return [
        source.row(STUDY, method, metric, float(right[g, images].mean()), int(images.sum()), dim=dim, group=group)
        for (metric, group), images in groups.items()
        if images.any()
        for g, dim in enumerate(dims)
    ]


STUDY_PREFIX_KNOWLEDGE = "prefix_knowledge"
NAMES_SHOWN = 4
BATCH_ROWS = 8192


def sizes_from_two(dims: Sequence[int]) -> list[int]:
    """``dims``, and before them 2, 4, ... dims: sizes that were not trained, where a small set is still hard.

    Not 1: all cosines of one coordinate are 1 or -1.
    """
    below = [2**power for power in range(1, 32) if 2**power < dims[0]]
    return [*below, *dims]


def nearest_classes(
    queries: np.ndarray, database: np.ndarray, database_labels: np.ndarray, dims: Sequence[int]
) -> np.ndarray:
    """The class ``(G, Q)`` int64 of each query's nearest neighbor by cosine at each size, trained or not.

    All queries are searched for: where they are many, take some with `mrl.studies.retrieval.thin_indices` first. What
    is counted of the result is of the queries taken.

    Raises:
        UserError: As `mrl.exact_search`.
    """
    found = exact_search(queries, database, 1, dims, progress=True)
    return np.stack([np.asarray(database_labels)[found[dim][0][:, 0]] for dim in dims])


def group_classes(vectors: np.ndarray, labels: np.ndarray, classes: Sequence[str], num_groups: int) -> Hierarchy:
    """Superclasses where there is no table of them: classes whose mean unit embeddings point the same way.

    Agglomerative clustering, average linkage, of the cosines between the class means at full width. A group is
    called by its classes.

    Args:
        vectors: Embeddings ``(N, D)``, raw; those of training images, so that no validation image has a say. Read in
            blocks.
        labels: ``(N,)`` int64.
        classes: C names.
        num_groups: 2 to C.

    Raises:
        UserError: The number of groups is not possible, or a class has no image.
    """
    if not 2 <= num_groups <= len(classes):
        raise UserError(f"num_groups is {num_groups}; allowed are 2 to the number of classes, {len(classes)}")
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        raise UserError(f"class {classes[int(counts.argmin())]!r} has no image, so it cannot be grouped")
    from sklearn.cluster import AgglomerativeClustering

    sums = torch.zeros(len(classes), vectors.shape[1], dtype=torch.float64)
    for start in range(0, len(vectors), BATCH_ROWS):
        block = torch.from_numpy(np.array(vectors[start : start + BATCH_ROWS], dtype=np.float32))
        of_block = torch.from_numpy(np.array(labels[start : start + BATCH_ROWS], dtype=np.int64))
        sums.index_add_(0, of_block, unit_prefix(block, vectors.shape[1]).double())
    means = sums.numpy() / counts[:, None]
    clusters = AgglomerativeClustering(num_groups, metric="cosine", linkage="average").fit_predict(means)
    # Groups are numbered by their first class, so that the same clusters always get the same numbers.
    first = sorted(range(num_groups), key=lambda group: int((clusters == group).argmax()))
    superclass_of = np.array([first.index(cluster) for cluster in clusters], dtype=np.int64)
    members = [[classes[c] for c in np.flatnonzero(superclass_of == group).tolist()] for group in range(num_groups)]
    return Hierarchy(superclass_of, tuple(map(_group_name, members)))


def knowledge(
    predictions: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    groups: Hierarchy,
    source: Source,
    method: str,
    *,
    num_shuffles: int = 50,
    seed: int = 0,
) -> list[Row]:
    """Rows of what is right at each size: "top_1", "superclass_top_1", and "shuffled_superclass_top_1" beside it.

    A superclass is easier than its classes whatever a model has learned. The last metric tells by how much: the
    mean over random groups of the same numbers of classes.

    Args:
        predictions: Classes ``(G, N)`` int64, smallest size first.
        labels: ``(N,)`` int64.
        dims: G prefix sizes.
        groups: The superclasses; every class has one.
        source: What the rows are of.
        method: The rows' method.
        num_shuffles: How many random groupings.
        seed: Of these.

    Raises:
        UserError: The shapes do not fit each other.
    """
    rows = [
        source.row(STUDY_PREFIX_KNOWLEDGE, method, "top_1", float((of_size == labels).mean()), len(labels), dim=dim)
        for dim, of_size in zip(dims, predictions, strict=True)
    ]
    of_groups = hierarchy(predictions, labels, dims, groups, source, method)
    rows += [
        source.row(STUDY_PREFIX_KNOWLEDGE, method, row.metric, row.value, row.n, dim=row.dim)
        for row in of_groups
        if row.metric == "superclass_top_1" and row.group is None
    ]
    rng = np.random.default_rng(seed)
    shuffled = np.stack([rng.permutation(groups.superclass_of) for _ in range(num_shuffles)])
    for dim, of_size in zip(dims, predictions, strict=True):
        value = float((shuffled[:, of_size] == shuffled[:, labels]).mean())
        rows.append(
            source.row(STUDY_PREFIX_KNOWLEDGE, method, "shuffled_superclass_top_1", value, len(labels), dim=dim)
        )
    return rows


def confusion_counts(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of each class (rows) are taken for each class (columns) at each size: ``(G, C, C)`` int64.

    Of the images that ``predictions`` ``(G, N)`` and ``labels`` ``(N,)`` are of, which may be some of all.
    """
    pairs = np.asarray(labels) * num_classes + predictions
    counts = [np.bincount(of_size, minlength=num_classes**2) for of_size in pairs]
    return np.stack(counts).reshape(len(predictions), num_classes, num_classes)


def sizes_needed(confusions: np.ndarray, dims: Sequence[int], tolerance: float = 0.01) -> np.ndarray:
    """The smallest size ``(C,)`` from which on a class is as accurate as at the largest; 0 if it has no image.

    Args:
        confusions: ``(G, C, C)`` of `confusion_counts`.
        dims: G prefix sizes, ascending.
        tolerance: How much less accurate, 0 to 1, still counts as the same.
    """
    totals = confusions[0].sum(axis=1)
    accuracy = np.diagonal(confusions, axis1=1, axis2=2) / np.maximum(totals, 1)
    enough = accuracy >= accuracy[-1] - tolerance - 1e-12
    stays = np.logical_and.accumulate(enough[::-1], axis=0)[::-1]
    return np.where(totals > 0, np.asarray(dims)[stays.argmax(axis=0)], 0)


def _group_name(members: Sequence[str]) -> str:
    shown = ", ".join(members[:NAMES_SHOWN])
    return shown if len(members) <= NAMES_SHOWN else f"{shown} and {len(members) - NAMES_SHOWN} more"
