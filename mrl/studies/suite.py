"""All studies that need nothing but a run's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mrl.adapt import MIN_VECTORS
from mrl.matryoshka import default_nesting_list
from mrl.results import Row
from mrl.retrieval.quantization import faiss_installed
from mrl.studies.adaptive_classification import cascade, fixed_feature, oracle
from mrl.studies.adaptive_retrieval import adaptive_retrieval
from mrl.studies.baselines import classification_baselines, learned_baselines, retrieval_baselines
from mrl.studies.classification import classification, predict
from mrl.studies.geometry import similarity
from mrl.studies.hierarchy import build_hierarchy, default_superclasses, hierarchy, per_class, within_superclasses
from mrl.studies.quantization import quantization
from mrl.studies.retrieval import interpolated_dims, retrieval
from mrl.studies.run import OpenedRun

LONG = ("quantization", "baselines")


def run_studies(
    run: OpenedRun,
    device: torch.device,
    superclasses: Mapping[str, str] | None = None,
    max_queries: int | None = None,
    skip: Sequence[str] = (),
) -> list[Row]:
    """Return the rows of every study of a run, except those in ``skip``, which may name any of `LONG`.

    ``superclasses`` is ``{class: superclass}``; if None, the paper's on ImageNet, and no hierarchy study on other data.
    With ``max_queries``, all retrieval studies use only that many queries; see `mrl.studies.retrieval.thin_indices`.
    """
    dims, width, source = run.head.nesting_list, run.val.vectors.shape[1], run.source
    method = run.trained_method
    classifiers = run.head.weights_and_biases()
    vectors, labels = run.val.vectors, run.val.labels
    sets = (vectors, labels, run.train.vectors, run.train.labels)

    rows = classification(vectors, labels, classifiers, source, method, device=device)
    # The paper's table 29 tests doubling sizes whatever the nesting list was.
    between = {dim for dim in (*default_nesting_list(width), *interpolated_dims(dims)) if dims[0] < dim < dims[-1]}
    by_method: dict[str, Sequence[int]] = {method: sorted({*dims, *between})}
    if dims == (width,):
        by_method["FF truncated"] = run.dims
        rows += classification(vectors, labels, run.classifiers, source, "FF truncated", device=device)
    found = retrieval(*sets, by_method, source, max_queries=max_queries, device=device)
    rows += found
    if faiss_installed() and "quantization" not in skip:
        trained = [row for row in found if row.dim in dims or row.method == "FF truncated"]
        rows += quantization(*sets, trained, max_queries=max_queries, device=device)
    rows += similarity(vectors, labels, dims, source, method)

    single = predict(vectors, classifiers, device=device)
    augmented, flip_source = single, source
    if run.val_flip is not None:
        augmented = predict(vectors, classifiers, run.val_flip.vectors, device=device)
        flip_source = replace(source, flip=True)
    correct = augmented.classes == labels
    if len(dims) > 1:
        rows += cascade(augmented.confidence, correct, dims, flip_source, method)
        rows += oracle(augmented.classes, labels, dims, flip_source, method)
        rows += adaptive_retrieval(*sets, dims, source, method, max_queries=max_queries, device=device)
    else:
        rows += fixed_feature(correct[0], dims[0], flip_source)

    rows += per_class(single.classes, labels, dims, run.classes, source, method)
    if superclasses := superclasses or default_superclasses(run.classes):
        table = build_hierarchy(run.classes, superclasses)
        rows += hierarchy(single.classes, labels, dims, table, source, method)
        rows += within_superclasses(vectors, labels, classifiers, table, source, method, device=device)

    if len(sizes := by_method.get("FF truncated", ())) > 1 and "baselines" not in skip:
        rows += retrieval_baselines(
            *sets, sizes, source, max_queries=max_queries, device=device, code="quantization" not in skip
        )
        if len(run.train.labels) >= MIN_VECTORS:
            rows += learned_baselines(*sets, sizes, source, max_queries=max_queries, device=device)
        of_train = (run.train.vectors, run.train.labels)
        rows += classification_baselines(*of_train, vectors, labels, classifiers[0], sizes, source, device=device)
    return rows
