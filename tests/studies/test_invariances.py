"""What holds for every study of a search, whatever it measures."""

import dataclasses

import numpy as np
import pytest

from mrl import adapt
from mrl.results import Source
from mrl.studies.adaptive_retrieval import adaptive_retrieval
from mrl.studies.baselines import learned_baselines, retrieval_baselines
from mrl.studies.quantization import quantization
from mrl.studies.retrieval import retrieval

SOURCE = Source("digits", "run", 3, 32, 28, False)
DIMS = (4, 8, 16)
# Neighbors that float16 (2,048), int16 (32,768) or uint16 (65,536) would confuse.
NAMES = np.array([7, 2048, 2049, 32_768, 65_536, 67_584, 67_585, 98_304, 2**40 + 2048, 2**40 + 2049])


def exact(*sets, **rest):
    return retrieval(*sets, {"MRL": DIMS}, SOURCE, ks=(10,), **rest)


def coded(*sets, **rest):
    pytest.importorskip("faiss")
    return quantization(*sets, exact(*sets, **rest), **rest)


STUDIES = {
    "retrieval": exact,
    "adaptive_retrieval": lambda *sets, **rest: adaptive_retrieval(*sets, DIMS, SOURCE, "MRL", **rest),
    "quantization": coded,
    "retrieval_baselines": lambda *sets, **rest: retrieval_baselines(*sets, DIMS, SOURCE, **rest),
    "learned_baselines": lambda *sets, **rest: learned_baselines(*sets, DIMS, SOURCE, **rest),
}


@pytest.fixture(params=STUDIES)
def study(request, monkeypatch):
    monkeypatch.setattr(adapt, "STEPS", 5)
    return lambda *sets, **rest: [
        dataclasses.replace(row, ms_per_query=None) for row in STUDIES[request.param](*sets, **rest)
    ]


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    centers, labels = 3 * rng.random((10, 16)), (np.arange(40) % 10, np.arange(300) % 10)
    queries, database = (np.abs(centers[of] + rng.standard_normal((len(of), 16))) for of in labels)
    return queries.astype(np.float32), labels[0], database.astype(np.float32), labels[1]


def test_fault_1_labels_are_names_of_any_size_and_absent_ones_are_never_found(study, sets):
    queries, query_labels, database, database_labels = sets
    named = study(queries, NAMES[query_labels], database, NAMES[database_labels])
    assert named == study(*sets)
    absent = study(queries, query_labels + 65_536, database, database_labels)
    assert {row.value for row in absent} == {0} and {row.n for row in absent} == {40}


def test_max_queries_takes_evenly_spread_ones(study, sets):
    queries, query_labels, *database = sets
    some = np.array([0, 20, 39])
    fewer = study(*sets, max_queries=3)
    assert fewer == study(queries[some], query_labels[some], *database) and {row.n for row in fewer} == {3}


@pytest.mark.parametrize("name", ["retrieval", "adaptive_retrieval", "quantization"])
def test_fault_19_neither_lengths_nor_coordinates_past_the_size_change_a_row(name, sets):
    queries, query_labels, database, database_labels = sets
    rng = np.random.default_rng(1)
    changed = [np.pad(z * 2.0 ** rng.integers(-3, 4, (len(z), 1)), ((0, 0), (0, 4))) for z in (queries, database)]
    for z in changed:
        z[:, 16:] = rng.standard_normal((len(z), 4))
    rows, expected = (
        STUDIES[name](z[0].astype(np.float32), query_labels, z[1].astype(np.float32), database_labels)
        for z in (changed, (queries, database))
    )
    assert [row.value for row in rows] == [row.value for row in expected]
