"""Accuracy on further labelled images whose classes are some of the trained ones (section 5, table 17)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np
import torch

from mrl.errors import UserError
from mrl.results import Row, Source
from mrl.studies.classification import classification
from mrl.studies.logits import Classifier

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
