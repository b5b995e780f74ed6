"""Accuracy over superclasses and single classes at every prefix (appendix J, tables 24 and 25, figures 10 to 12)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mrl.errors import UserError
from mrl.results import Row, Source
from mrl.studies.oracle import check_predictions

STUDY, CLASS_STUDY = "hierarchy", "per_class"
OUTSIDE = -1
IN, OF_CLASS = "top_1 in ", "top_1 of class "
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


def read_superclasses(path: str | Path) -> dict[str, str]:
    """``{class: superclass}`` of a tab-separated table whose first line names its columns.

    The first column is the class as its folder is called; another is called "superclass".

    Raises:
        UserError: The file is missing, lacks the column, or a class has none or two superclasses.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a table of classes and superclasses")
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)) or [[]]
    if "superclass" not in header[1:]:
        raise UserError(f"{path} has the columns {header}; needed are the class first and one called superclass")
    column = header.index("superclass")
    table: dict[str, str] = {}
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        superclass = line[column].strip() if len(line) > column else ""
        if not superclass or table.setdefault(line[0], superclass) != superclass:
            raise UserError(f"{path}, line {number}: {line[0]!r} needs one superclass, and the same wherever it stands")
    return table


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
    - "top_1 in <superclass>": the class itself is right, of the images of this superclass (figure 11).
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
    is a share of the classes that have images. Classes without images have no rows. Fixed-feature models are given
    together, a size each.

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
