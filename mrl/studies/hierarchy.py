"""Accuracy over superclasses and single classes at every prefix (appendix J, tables 24 and 25, figures 10 to 12)."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from mrl.data.folder import shown
from mrl.errors import UserError
from mrl.matryoshka import unit_prefix
from mrl.paper import paper_superclasses
from mrl.results import Row, Source, span
from mrl.retrieval.search import exact_search
from mrl.studies.classification import Classifier, classification
from mrl.studies.transfer import restrict, synsets

if TYPE_CHECKING:
    from mrl.studies.run import OpenedRun

OUTSIDE = -1
# Monotone, dip then rise and no clear trend are the paper's (appendix J); the others complete them.
TRENDS = ("monotone", "rise then dip", "dip then rise", "falling", "no clear trend")
NUM_NAMES = 5
NUM_CONFUSIONS = 10
NUM_SHUFFLES = 20
MIN_ERRORS = 30
MAX_COLORS = 10


def read_class_table(path: str | Path, column: str) -> dict[str, str]:
    """Return ``{class: its entry in column}`` of a tab-separated table with a header, whose first column is the class.

    Names are compared in one Unicode form, as those of class folders are.

    Raises:
        UserError: The file is missing or empty, lacks the column, or a class has no entry or two different ones.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a table whose columns are the class and its {column}")
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, quoting=csv.QUOTE_NONE, keep_default_na=False, index_col=False)
    except ValueError as error:
        raise UserError(f"{path} is not a tab-separated table: {error}") from error
    if column not in table.columns[1:]:
        raise UserError(f"{path} has the columns {list(table)}; needed are the class first and one called {column}")
    names, entries = (of.fillna("").str.normalize("NFC") for of in (table.iloc[:, 0], table[column]))
    pairs = pd.DataFrame({"name": names, "entry": entries.str.strip()}).drop_duplicates()
    bad = pairs[pairs["name"].duplicated() | (pairs["entry"] == "")]
    if len(bad):
        raise UserError(f"{path}: class {bad['name'].iloc[0]!r} needs one {column}, the same in every line")
    if pairs.empty:
        raise UserError(f"{path} lists no classes")
    return dict(zip(pairs["name"], pairs["entry"], strict=True))


class Hierarchy(NamedTuple):
    """The superclass of each class."""

    superclass_of: np.ndarray  # (C,) int64, indices into names; -1 for a class that has none
    names: tuple[str, ...]  # the superclasses that occur, sorted
    note: str = ""  # how many there are, from where, and whether they mean anything


def default_superclasses(classes: Sequence[str]) -> dict[str, str] | None:
    """Return the paper's 30 superclasses if ``classes`` are the WordNet ids of ImageNet's 1,000, else None."""
    return paper_superclasses() if set(classes) == set(synsets("imagenet_v2")) else None


def build_hierarchy(classes: Sequence[str], table: Mapping[str, str]) -> Hierarchy:
    """Look up the superclasses of ``classes`` in a ``{class: superclass}`` table, which may lack some of them."""
    codes, names = pd.factorize(pd.Series(classes).map(table), sort=True)  # a class that is not in the table is -1
    if not len(names):
        raise UserError(f"none of the {len(classes)} classes ({shown(classes)}) is in the superclass table")
    return Hierarchy(codes.astype(np.int64), tuple(names), f"{_sizes(codes)}, from a table")


def _sizes(superclass_of: np.ndarray) -> str:
    sizes = np.bincount(superclass_of[superclass_of != OUTSIDE])
    return f"{len(sizes)} groups of {span(sizes)} classes"


def hierarchy(
    predictions: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    superclasses: Hierarchy,
    source: Source,
    method: str,
) -> list[Row]:
    """Return rows of accuracy over superclasses, of predicted classes ``(G, N)`` at G ``dims`` and labels ``(N,)``.

    - "superclass_top_1": share of predictions in the label's superclass, of the images that have a superclass. It has
      rows of all of them and, with a group, of those of each superclass.
    - "superclass_top_1_with_reject": the same of all images, with the classes outside the table as one more superclass
      (the paper's 31st); only if there are such classes.
    - "top_1", with a group: share of correct classes, of the images of one superclass.
    """
    truth, predicted = superclasses.superclass_of[labels], superclasses.superclass_of[predictions]
    right = {"top_1": predictions == labels, "superclass_top_1": predicted == truth}
    right["superclass_top_1_with_reject"] = right["superclass_top_1"]
    parts: list[tuple[str, str | None, np.ndarray]] = [("superclass_top_1", None, truth != OUTSIDE)]
    if OUTSIDE in superclasses.superclass_of:
        parts.append(("superclass_top_1_with_reject", None, np.ones_like(truth, dtype=bool)))
    for metric in ("superclass_top_1", "top_1"):
        parts += [(metric, name, truth == i) for i, name in enumerate(superclasses.names)]
    return [
        source.row("hierarchy", method, metric, of_size[images].mean(), int(images.sum()), dim=dim, group=group)
        for metric, group, images in parts
        if images.any()
        for dim, of_size in zip(dims, right[metric], strict=True)
    ]


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
    """Return rows "top_1_within" of each superclass: only its own classes compete for its images (figure 11).

    Arguments as in `classification`. Superclasses of one class have no rows.
    """
    rows: list[Row] = []
    for i, name in enumerate(superclasses.names):
        members = np.flatnonzero(superclasses.superclass_of == i)
        images = np.flatnonzero(np.isin(labels, members))
        if len(members) > 1 and len(images):
            own = np.searchsorted(members, labels[images])
            found = classification(vectors[images], own, restrict(classifiers, members), source, method, device=device)
            found = [row for row in found if row.metric == "top_1"]
            rows += [replace(row, study="hierarchy", metric="top_1_within", group=name) for row in found]
    return rows


def per_class(
    predictions: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    classes: Sequence[str],
    source: Source,
    method: str,
) -> list[Row]:
    """Return rows of each class's accuracy ("top_1", with the class as group) and of how accuracy changes with size.

    "share_of_classes" is the share of the classes with one `trend`, the group. Classes without images count nowhere,
    and a single size has no trend. Arguments as in `hierarchy`; ``classes`` are C names.
    """
    counts = np.bincount(labels, minlength=len(classes))
    correct = np.stack([np.bincount(labels[of_size == labels], minlength=len(classes)) for of_size in predictions])
    seen = np.flatnonzero(counts).tolist()
    rows = [
        source.row("per_class", method, "top_1", correct[g, c] / counts[c], int(counts[c]), dim=dim, group=classes[c])
        for c in seen
        for g, dim in enumerate(dims)
    ]
    found = [trend(correct[:, c]) for c in seen] if len(dims) > 1 else []
    return rows + [
        source.row("per_class", method, "share_of_classes", found.count(name) / len(seen), len(seen), group=name)
        for name in TRENDS
        if found
    ]


def trend(values: Sequence[float] | np.ndarray) -> str:
    """Return which of `TRENDS` a sequence follows; steps of 0 do not count, and a constant one is monotone."""
    steps = np.sign(np.diff(values))
    steps = steps[steps != 0]
    if not (steps < 0).any():
        return "monotone"
    if not (steps > 0).any():
        return "falling"
    if (np.diff(steps) != 0).sum() > 1:
        return "no clear trend"
    return "rise then dip" if steps[0] > 0 else "dip then rise"


def sizes_from_two(dims: Sequence[int]) -> list[int]:
    """Return ``dims`` and, before them, the powers of two from 2 on: untrained sizes at which small sets are hard."""
    return [*(2**power for power in range(1, 32) if 2**power < dims[0]), *dims]


def nearest_classes(
    queries: np.ndarray, database: np.ndarray, database_labels: np.ndarray, dims: Sequence[int]
) -> np.ndarray:
    """Return the class ``(G, Q)`` int64 of each query's nearest neighbor by cosine at each size, trained or not."""
    found = exact_search(queries, database, 1, dims, progress=True)
    return np.stack([database_labels[found[dim][0][:, 0]] for dim in dims])


def group_classes(
    vectors: np.ndarray, labels: np.ndarray, classes: Sequence[str], num_groups: int | None = None
) -> Hierarchy:
    """Cluster classes whose mean unit embeddings point the same way, where there is no table of superclasses.

    Ward's linkage of the directions from the mean of all classes to each, at full width, which makes groups of similar
    sizes; by default about as many groups as a group has classes. Give training images, so that the groups do not
    depend on validation images. A group is named after its classes. The note says so if classes are no closer to their
    group (mean silhouette) than in the best of 20 groupings of coordinates that were shuffled over the classes.
    """
    unit = [unit_prefix(torch.from_numpy(vectors[labels == c]), vectors.shape[1]) for c in range(len(classes))]
    means = torch.stack([z.mean(dim=0) for z in unit]).numpy()
    means = means - means.mean(axis=0)
    num_groups, rng = num_groups or max(2, round(len(classes) ** 0.5)), np.random.default_rng(0)
    clusters, score = _cluster(means, num_groups)
    at_random = max(_cluster(rng.permuted(means, axis=0), num_groups)[1] for _ in range(NUM_SHUFFLES))
    superclass_of, first = pd.factorize(clusters)  # numbers groups by their first class
    members = [[classes[c] for c in np.flatnonzero(superclass_of == group).tolist()] for group in range(len(first))]
    note = f"{_sizes(superclass_of)}, by direction of their mean training embeddings; "
    note += "structure" if score > at_random else "no group structure: other groups are as close to a class as its own"
    note += f" (silhouette {score:.2f}, at random up to {at_random:.2f})"
    return Hierarchy(superclass_of.astype(np.int64), tuple(map(shown, members)), note)


def _cluster(means: np.ndarray, num_groups: int) -> tuple[np.ndarray, float]:
    """Return the group ``(C,)`` of each class and the mean silhouette; 0 if every class is a group."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    directions = F.normalize(torch.from_numpy(means)).numpy()
    clusters = AgglomerativeClustering(num_groups).fit_predict(directions)
    apart = num_groups < len(means)
    return clusters, float(silhouette_score(directions, clusters, metric="cosine")) if apart else 0.0


def class_groups(
    run: OpenedRun, table: str | None = os.environ.get("MRL_SUPERCLASSES")
) -> tuple[Hierarchy, Sequence[str]]:
    """Return the groups of a run's classes and the names of the classes, for display.

    Both are from a ``table`` with the columns class, superclass and, if classes have other names, name. Without one,
    they are the paper's on ImageNet, else `group_classes`, and the names are the classes themselves.
    """
    superclasses = default_superclasses(run.classes)
    names: dict[str, str] = {}
    if table:
        superclasses = read_class_table(table, "superclass")
        with contextlib.suppress(UserError):  # there is no such column
            names = read_class_table(table, "name")
    if superclasses:
        return build_hierarchy(run.classes, superclasses), [names.get(name, name) for name in run.classes]
    return group_classes(run.train.vectors, run.train.labels, run.classes), run.classes


def colors_of_images(run: OpenedRun, indices: np.ndarray) -> tuple[np.ndarray, Sequence[str]]:
    """Return what to color validation images by, ``(N,)``, and its names: classes, or groups of more than ten classes.

    Images of classes without a superclass are the last group, "other".
    """
    labels = run.val.labels[indices]
    if len(run.classes) <= MAX_COLORS:
        return labels, run.classes
    groups, _ = class_groups(run)
    of_images = groups.superclass_of[labels]
    return np.where(of_images == OUTSIDE, len(groups.names), of_images), [*groups.names, "other"]


def knowledge(
    predictions: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    groups: Hierarchy,
    source: Source,
    method: str,
    *,
    num_shuffles: int = 50,
) -> list[Row]:
    """Return rows "top_1", "superclass_top_1" and "shuffled_superclass_top_1" of study "prefix_knowledge" at each size.

    A superclass is easier than its classes whatever a model has learned. The last metric shows by how much: it is the
    mean over ``num_shuffles`` random groups of the same sizes. Images of classes without a superclass do not count.
    Arguments as in `hierarchy`.
    """
    rng = np.random.default_rng(0)
    grouped = groups.superclass_of != OUTSIDE
    predictions, labels = predictions[:, grouped[labels]], labels[grouped[labels]]
    shuffled = np.tile(groups.superclass_of, (num_shuffles, 1))
    shuffled[:, grouped] = [rng.permutation(groups.superclass_of[grouped]) for _ in range(num_shuffles)]
    rows = []
    for dim, of_size in zip(dims, predictions, strict=True):
        for metric, right in (
            ("top_1", of_size == labels),
            ("superclass_top_1", groups.superclass_of[of_size] == groups.superclass_of[labels]),
            ("shuffled_superclass_top_1", shuffled[:, of_size] == shuffled[:, labels]),
        ):
            rows.append(source.row("prefix_knowledge", method, metric, right.mean(), len(labels), dim=dim))
    return rows


def describe_knowledge(rows: Sequence[Row]) -> str:
    """Return the rows of `knowledge` as a table, and a sentence on whether errors stay in their group.

    They do if, at the sizes with 30 errors or more, they stay more often than in random groups by two standard errors.
    A second sentence then compares the smallest and the largest trained size, those of the rows of `classification`.
    """
    trained = [row.dim for row in rows if row.study == "classification" and row.dim is not None]
    study = [row for row in rows if row.study == "prefix_knowledge"]
    found, n = pd.DataFrame(map(vars, study)).pivot_table("value", "dim", "metric"), study[0].n
    wrong = 1 - found["top_1"]
    inside, chance = (
        (found[f"{metric}superclass_top_1"] - found["top_1"]) / wrong.where(wrong > 0) for metric in ("", "shuffled_")
    )
    enough = n * wrong >= MIN_ERRORS
    above = enough & (inside - chance > 2 * (chance * (1 - chance) / (n * wrong)) ** 0.5)
    if not enough.any():
        verdict = f"Fewer than {MIN_ERRORS} of {n:,} images are wrong at every size: too few errors to see groups in."
    elif above.any():
        dims = ", ".join(map(str, found.index[above]))
        verdict = f"Errors stay in their group more often than in random groups at {dims} dims."
        first, last = min(trained, default=found.index[0]), max(trained, default=found.index[-1])
        if first < last and enough[first] and enough[last]:
            kept, change = found.loc[first] / found.loc[last], inside[first] - inside[last]
            error = 2 * (inside * (1 - inside) / (n * wrong))[[first, last]].sum() ** 0.5
            more = "no more often" if abs(change) <= error else "more often" if change > 0 else "less often"
            verdict += (
                f"\nWith {first} dims the class is right {kept['top_1']:.0%} as often as with {last}, the group "
                f"{kept['superclass_top_1']:.0%} as often. Errors stay in their group {more} than at {last} dims."
            )
    else:
        verdict = "Errors stay in their group no more often than in random groups: these groups are not learned first."
    shares = {"class right": found["top_1"], "group right": found["superclass_top_1"]}
    shares |= {"errors in their group": inside, "in random groups": chance}
    table = 100 * pd.DataFrame(shares)
    return f"{table.to_string(float_format='{:.1f} %'.format, na_rep='-')}\n\n{verdict}"


def confusion_counts(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return how many images of each class (first C) are taken for each class (second C): ``(G, C, C)`` int64."""
    counts = [np.bincount(pairs, minlength=num_classes**2) for pairs in labels * num_classes + predictions]
    return np.stack(counts).reshape(-1, num_classes, num_classes)


def describe_confusions(confusions: np.ndarray, dims: Sequence[int], names: Sequence[str], groups: Hierarchy) -> str:
    """Return the most frequent confusions at the smallest size, and how many there are at the largest, as a table.

    ``confusions`` is ``(G, C, C)`` of `confusion_counts`; of equal numbers, the first pair comes first.
    """
    wrong = np.where(np.eye(len(names), dtype=bool), 0, confusions)
    order = [divmod(int(i), len(names)) for i in np.argsort(-wrong[0], axis=None, kind="stable")[:NUM_CONFUSIONS]]
    pairs = [pair for pair in order if wrong[0][pair]]
    if not pairs:
        return f"Nothing is confused at {dims[0]} dims."
    of = groups.superclass_of
    inside = [bool(of[a] == of[b] != OUTSIDE) for a, b in pairs]
    columns: dict[str, Any] = {"class": [names[a] for a, _ in pairs], "taken for": [names[b] for _, b in pairs]}
    columns |= {f"at {dims[g]}": [int(wrong[g][pair]) for pair in pairs] for g in (0, -1)}
    columns["group"] = ["the same" if same else "another" for same in inside]
    share = ((of[:, None] == of) & (of != OUTSIDE))[~np.eye(len(of), dtype=bool)].mean()
    return (
        f"{pd.DataFrame(columns).to_string(index=False)}\n\nOf the {len(pairs)} most frequent confusions at {dims[0]} "
        f"dims, {sum(inside)} are between classes of one group; of all pairs of classes, {share:.0%} are."
    )


def describe_needs(confusions: np.ndarray, dims: Sequence[int], names: Sequence[str]) -> str:
    """Return how many classes need each size by `sizes_needed`, and which classes the smallest size never predicts."""
    needed = sizes_needed(confusions, dims)
    counts = ", ".join(f"{(needed == dim).sum()} need {dim}" for dim in dims)
    unseen = [name for name, number in zip(names, confusions[0].sum(axis=0), strict=True) if not number]
    never = f"never predicts {len(unseen)} of them: {', '.join(unseen[:NUM_NAMES])}"
    never += ", ..." if len(unseen) > NUM_NAMES else "."
    some = never if unseen else "predicts each of them for some image."
    return f"Of {(needed > 0).sum()} classes, {counts} dims.\nThe smallest size, {dims[0]} dims, {some}"


def sizes_needed(confusions: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    """Return the smallest size ``(C,)`` from which on a class is as accurate as at the largest; 0 without images.

    ``confusions`` is ``(G, C, C)`` of `confusion_counts`. Accuracies within a standard error of the one at the largest
    size, or within one image of the class, count as equal.
    """
    totals = confusions[0].sum(axis=1)
    correct = np.diagonal(confusions, axis1=1, axis2=2)
    errors = (correct[-1] * (1 - correct[-1] / totals.clip(min=1))) ** 0.5  # binomial, in images
    enough = correct >= correct[-1] - errors.clip(min=1) - 1e-9
    stays = np.logical_and.accumulate(enough[::-1], axis=0)[::-1]
    return np.where(totals > 0, np.asarray(dims)[stays.argmax(axis=0)], 0)
