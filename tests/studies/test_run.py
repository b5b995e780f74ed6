import numpy as np
import pytest
import torch

from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.retrieval.embeddings import EmbeddingMetadata, EmbeddingSet
from mrl.studies.run import EmbeddedRun, run_studies


def embeddings(split, num_images):
    generator = np.random.default_rng(num_images)
    vectors = generator.normal(size=(num_images, 32)).astype(np.float32)
    metadata = EmbeddingMetadata("model", "digits", split, 8, 8, "mean 0, std 1", False, "classes")
    return EmbeddingSet(vectors, np.arange(num_images) % 3, metadata)


@pytest.mark.parametrize(
    ("trained", "scored"),
    [
        ((8, 14, 20, 26, 32), {8, 11, 14, 16, 17, 20, 23, 26, 29, 32}),  # evenly spaced, as in the paper's table 29
        ((8, 16, 32), {8, 12, 16, 24, 32}),
    ],
)
def test_retrieval_is_scored_at_trained_doubling_and_half_way_sizes(trained, scored):
    head = NestedLinear(trained, 3)
    source = Source("digits", "run", 0, 8, 8, flip=False)
    run = EmbeddedRun(source, head, ("a", "b", "c"), embeddings("train", 120), embeddings("val", 30), None)
    rows = run_studies(run, torch.device("cpu"))
    assert {row.dim for row in rows if row.study == "retrieval"} == scored
    assert {row.dim for row in rows if row.study == "classification"} == set(trained)
