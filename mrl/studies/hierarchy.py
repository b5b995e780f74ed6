"""Accuracy over superclasses and single classes at every prefix (appendix J, tables 24 and 25, figures 10 to 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from mrl.errors import UserError
from mrl.paper import paper_superclasses
from mrl.results import Row, Source
from mrl.studies.classification import classification
from mrl.studies.finite import refuse_array_not_finite
from mrl.studies.logits import Classifier
from mrl.studies.oracle import check_predictions
from mrl.studies.robustness import restrict, synsets

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
    check_predictions(predictions, labels, dims)
    truth, predicted = superclasses.superclass_of[labels], superclasses.superclass_of[predictions]
    inside = truth != OUTSIDE
    if not inside.any():
        raise UserError(f"{source.run}: none of the {len(labels)} images has a class of the superclass table")
    groups = {"superclass_top_1": inside}
    if (superclasses.superclass_of == OUTSIDE).any():
        groups["superclass_top_1_with_reject"] = np.ones_like(inside)
    groups |= {f"superclass_top_1 in {name}": truth == i for i, name in enumerate(superclasses.names)}
    rows = _rows(predicted == truth, dims, groups, source, method)
    within = {f"{IN}{name}": truth == i for i, name in enumerate(superclasses.names)}
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
    refuse_array_not_finite(vectors)  # below, rows are those of a superclass
    rows: list[Row] = []
    for i, name in enumerate(superclasses.names):
        members = np.flatnonzero(superclasses.superclass_of == i)
        images = np.flatnonzero(superclasses.superclass_of[labels] == i)
        if len(members) > 1 and len(images):
            own = np.searchsorted(members, labels[images])
            restricted = restrict(classifiers, members)
            found = classification(vectors[images], own, restricted, source, method, device=device)
            rows += [replace(row, study=STUDY, metric=f"{WITHIN}{name}") for row in found if row.metric == "top_1"]
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
    check_predictions(predictions, labels, dims)
    correct, counts = class_counts(predictions, labels, len(classes))
    rows = []
    for c in np.flatnonzero(counts).tolist():
        for g, dim in enumerate(dims):
            share, n = correct[g, c] / counts[c], int(counts[c])
            rows.append(source.row(CLASS_STUDY, method, f"{OF_CLASS}{classes[c]}", float(share), n, dim=dim))
    if len(dims) == 1:
        return rows
    found = [trend(correct[:, c]) for c in np.flatnonzero(counts)]
    rows += [
        source.row(CLASS_STUDY, method, f"classes that are {name}", found.count(name) / len(found), len(found))
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
    right: np.ndarray, dims: Sequence[int], groups: Mapping[str, np.ndarray], source: Source, method: str
) -> list[Row]:
    """The share of ``right`` ``(G, N)`` in each group of images, given as masks ``(N,)``; empty groups have no rows."""
    return [
        source.row(STUDY, method, metric, float(right[g, images].mean()), int(images.sum()), dim=dim)
        for metric, images in groups.items()
        if images.any()
        for g, dim in enumerate(dims)
    ]
