from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mrl import adapt
from mrl.config import Config
from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.retrieval.embeddings import EmbeddingMetadata, EmbeddingSet
from mrl.studies.run import OpenedRun
from mrl.studies.suite import LONG, run_studies


def make_run(trained):
    def embeddings(split, num_images):
        vectors = np.random.default_rng(num_images).normal(size=(num_images, 32)).astype(np.float32)
        metadata = EmbeddingMetadata("model", "digits", split, 8, 8, "mean 0, std 1", False, "classes")
        return EmbeddingSet(vectors, np.arange(num_images) % 3, metadata)

    model = SimpleNamespace(head=NestedLinear(trained, 3), info=SimpleNamespace(classes=("a", "b", "c")))
    source = Source("digits", "run", 0, 8, 8, flip=False)
    return OpenedRun(Path(), Config(), model, source, embeddings("train", 120), embeddings("val", 30))


@pytest.mark.parametrize(
    ("trained", "scored"),
    [
        ((8, 14, 20, 26, 32), {8, 11, 14, 16, 17, 20, 23, 26, 29, 32}),  # evenly spaced, as in the paper's table 29
        ((8, 16, 32), {8, 12, 16, 24, 32}),
        ((16, 24), {16, 20, 24}),  # neither below nor beyond what was trained
    ],
)
def test_retrieval_is_scored_at_trained_doubling_and_half_way_sizes(trained, scored):
    rows = run_studies(make_run(trained), torch.device("cpu"))
    assert {row.dim for row in rows if row.study == "retrieval"} == scored
    assert {row.dim for row in rows if row.study == "classification"} == set(trained)


@pytest.mark.parametrize(("max_queries", "n"), [(None, 30), (7, 7)])
def test_all_methods_of_a_retrieval_table_have_the_same_queries(max_queries, n, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(adapt, "STEPS", 5)
    rows = [
        row
        for trained in ((8, 16, 32), (32,))
        for row in run_studies(make_run(trained), torch.device("cpu"), max_queries=max_queries)
        if "retrieval" in row.study or row.study == "quantization"
    ]
    assert {"MRL", "FF", "FF truncated", "FF PCA", "FF random projection"} <= {row.method for row in rows}
    assert {row.study for row in rows} == {"retrieval", "adaptive_retrieval", "quantization"}
    assert {row.n for row in rows} == {n}
    coded = {(row.method, row.dim) for row in rows if row.study == "quantization"}
    assert coded == {(method, dim) for method in ("MRL", "FF truncated", "FF PCA") for dim in (8, 16, 32)} | {
        ("FF", 32)
    }


def test_a_table_of_superclasses_has_rows_and_below_20_training_images_no_map_is_learned():
    cpu, table = torch.device("cpu"), {"a": "first", "b": "first", "c": "second"}
    rows = run_studies(make_run((8, 32)), cpu, table, skip=LONG)
    metrics = {row.metric for row in rows if row.study == "hierarchy"}
    assert metrics == {"superclass_top_1", "top_1", "top_1_within"}
    learned = {"FF supervised map", "FF unsupervised map"}
    for number, expected in ((19, set()), (20, learned)):
        run = make_run((32,))
        few = EmbeddingSet(run.train.vectors[:number], run.train.labels[:number], run.train.metadata)
        methods = {row.method for row in run_studies(replace(run, train=few), cpu, skip=["quantization"])}
        assert "FF PCA" in methods and methods & learned == expected
