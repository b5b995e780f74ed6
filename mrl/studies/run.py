"""Every study that needs nothing but a run's embeddings: arrays in, rows out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from mrl.matryoshka import default_nesting_list
from mrl.results import Row, method_name
from mrl.studies.adaptive_classification import cascade, fixed_feature, oracle
from mrl.studies.adaptive_retrieval import adaptive_retrieval
from mrl.studies.baselines import classification_baselines, retrieval_baselines
from mrl.studies.classification import classification, predict, truncations
from mrl.studies.geometry import similarity
from mrl.studies.hierarchy import build_hierarchy, default_superclasses, hierarchy, per_class, within_superclasses
from mrl.studies.opened_run import EmbeddedRun
from mrl.studies.retrieval import interpolated_dims, retrieval


def run_studies(run: EmbeddedRun, device: torch.device, superclasses: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of every study.

    ``superclasses`` is a ``{class: superclass}`` table for the hierarchy study, on ImageNet the paper's unless given.
    """
    dims, width = run.head.nesting_list, run.val.vectors.shape[1]
    method = method_name(dims, run.head.tied)
    truncated = default_nesting_list(width) if dims == (width,) else ()
    rows = _by_size(run, method, truncated, device)
    rows += _predictions(run, method, device, superclasses)
    if len(dims) > 1:
        arrays = (run.val.vectors, run.val.labels, run.train.vectors, run.train.labels)
        rows += adaptive_retrieval(*arrays, dims, run.source, method, device=device)
    if len(truncated) > 1:
        rows += _baselines(run, truncated, device)
    return rows


def _by_size(run: EmbeddedRun, method: str, truncated: Sequence[int], device: torch.device) -> list[Row]:
    """Linear classification, retrieval and similarity, by size."""
    val, train, dims = run.val, run.train, run.head.nesting_list
    classifiers = [run.head.weight_and_bias(g) for g in range(len(dims))]
    rows = classification(val.vectors, val.labels, classifiers, run.source, method, device=device)
    doubling = default_nesting_list(val.vectors.shape[1]) if len(dims) > 1 else ()  # table 29: whatever was trained
    by_method: dict[str, Sequence[int]] = {method: sorted({*dims, *doubling, *interpolated_dims(dims)})}
    if truncated:
        cut = truncations(*classifiers[0], truncated)
        rows += classification(val.vectors, val.labels, cut, run.source, "FF truncated", device=device)
        by_method["FF truncated"] = truncated
    rows += retrieval(val.vectors, val.labels, train.vectors, train.labels, by_method, run.source, device=device)
    return rows + similarity(val.vectors, val.labels, dims, run.source, method)


def _predictions(
    run: EmbeddedRun, method: str, device: torch.device, superclasses: Mapping[str, str] | None
) -> list[Row]:
    """The studies of predicted classes: cascade and oracle with both flips, classes and superclasses with one."""
    dims, labels = run.head.nesting_list, np.asarray(run.val.labels)
    classifiers = [run.head.weight_and_bias(g) for g in range(len(dims))]
    single = predict(run.val.vectors, classifiers, device=device)
    both, source = single, run.source
    if run.val_flip is not None:
        both = predict(run.val.vectors, classifiers, run.val_flip.vectors, device=device)
        source = replace(run.source, flip=True)
    correct = both.classes == labels
    if len(dims) > 1:
        rows = cascade(both.confidence, correct, dims, source, method)
        rows += oracle(both.classes, labels, dims, source, method)
    else:
        rows = fixed_feature(correct[0], dims[0], source)
    rows += per_class(single.classes, labels, dims, run.classes, run.source, method)
    if superclasses := superclasses or default_superclasses(run.classes):
        table = build_hierarchy(run.classes, superclasses)
        rows += hierarchy(single.classes, labels, dims, table, run.source, method)
        rows += within_superclasses(run.val.vectors, labels, classifiers, table, run.source, method, device=device)
    return rows


def _baselines(run: EmbeddedRun, dims: Sequence[int], device: torch.device) -> list[Row]:
    """What else could make a fixed-feature embedding small."""
    val, train, classifier = run.val, run.train, run.head.weight_and_bias(0)
    arrays = (val.vectors, val.labels, train.vectors, train.labels)
    rows = retrieval_baselines(*arrays, dims, run.source, device=device)
    return rows + classification_baselines(
        train.vectors, train.labels, val.vectors, val.labels, classifier, dims, run.source, device=device
    )
