"""What a prefix knows: groups of classes and classes, who is taken for whom, and which classes need more dims."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mrl.errors import UserError
from mrl.nesting import unit_prefix
from mrl.results import Row, Source
from mrl.retrieval.search import exact_search
from mrl.studies.hierarchy import Hierarchy, hierarchy
from mrl.studies.oracle import check_predictions

STUDY = "prefix_knowledge"
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
    """The class ``(G, Q)`` int64 of each query's nearest neighbour by cosine at each size, trained or not.

    All queries are searched for: where they are many, take some with `mrl.studies.retrieval.thin` first. Whatever is
    counted of the result is of the queries taken.

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
    check_predictions(predictions, labels, dims)
    rows = [
        source.row(STUDY, method, "top_1", float((of_size == labels).mean()), len(labels), dim=dim)
        for dim, of_size in zip(dims, predictions, strict=True)
    ]
    of_groups = hierarchy(predictions, labels, dims, groups, source, method)
    rows += [
        source.row(STUDY, method, row.metric, row.value, row.n, dim=row.dim)
        for row in of_groups
        if row.metric == "superclass_top_1"
    ]
    rng = np.random.default_rng(seed)
    shuffled = np.stack([rng.permutation(groups.superclass_of) for _ in range(num_shuffles)])
    for dim, of_size in zip(dims, predictions, strict=True):
        value = float((shuffled[:, of_size] == shuffled[:, labels]).mean())
        rows.append(source.row(STUDY, method, "shuffled_superclass_top_1", value, len(labels), dim=dim))
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
