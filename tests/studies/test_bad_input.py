"""What every study has to bear or refuse: broken embeddings, labels of any size, classes of few images, a large k."""

import numpy as np
import pytest
import torch

from mrl.errors import UserError
from mrl.results import Source
from mrl.studies.adaptive_classification import oracle
from mrl.studies.adaptive_retrieval import adaptive_retrieval
from mrl.studies.baselines import classification_baselines, fit_linear_probe, retrieval_baselines
from mrl.studies.classification import classification, predict
from mrl.studies.geometry import similarity
from mrl.studies.hierarchy import Hierarchy, hierarchy, per_class, within_superclasses
from mrl.studies.retrieval import retrieval
from mrl.studies.transfer import few_shot, robustness

SOURCE = Source("digits", "a_run", 3, 32, 28, False)
DIMS = (4, 8)
WEIGHTS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
CLASSIFIERS = [(WEIGHTS[:, :dim], torch.zeros(6)) for dim in DIMS]
TABLE = Hierarchy(np.array([0, 0, 0, 1, 1, -1]), ("a", "b"))
# The studies, each given queries with their labels and a database with its own.
SEARCHES = {
    "retrieval": lambda q, ql, d, dl: retrieval(q, ql, d, dl, {"MRL": DIMS}, SOURCE, ks=(10,)),
    "adaptive_retrieval": lambda q, ql, d, dl: adaptive_retrieval(q, ql, d, dl, DIMS, SOURCE, "MRL"),
    "retrieval_baselines": lambda q, ql, d, dl: retrieval_baselines(q, ql, d, dl, DIMS, SOURCE, draws=1),
}
BY_NAME = {
    **SEARCHES,
    "few_shot": lambda q, ql, d, dl: few_shot(q, ql, DIMS, SOURCE, "MRL", shots=(1, 3), num_draws=2),
    "similarity": lambda q, ql, d, dl: similarity(q, ql, DIMS, SOURCE, "MRL", num_pairs=500),
}
BY_CLASS = {
    "classification": lambda q, ql, d, dl: classification(q, ql, CLASSIFIERS, SOURCE, "MRL"),
    "robustness": lambda q, ql, d, dl: robustness(q, ql, CLASSIFIERS, np.arange(6), SOURCE, "MRL"),
    "within_superclasses": lambda q, ql, d, dl: within_superclasses(q, ql, CLASSIFIERS, TABLE, SOURCE, "MRL"),
    "predict": lambda q, ql, d, dl: predict(q, CLASSIFIERS),
    "linear_probe": lambda q, ql, d, dl: fit_linear_probe(q, ql, 6),
    "classification_baselines": lambda q, ql, d, dl: classification_baselines(
        d, dl, q, ql, CLASSIFIERS[1], DIMS, SOURCE
    ),
}


def make_sets(num_database=60):
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((6, 8))
    labels = np.arange(48) % 6, np.arange(num_database) % 6
    queries, database = (centers[of] + rng.standard_normal((len(of), 8)) for of in labels)
    return queries.astype(np.float32), labels[0], database.astype(np.float32), labels[1]


def untimed(rows):
    return [(row.study, row.method, row.metric, row.dim, row.shortlist_dim, row.rerank_dim, row.value) for row in rows]


@pytest.mark.parametrize("name", [*BY_NAME, *BY_CLASS])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_refused_naming_its_row(name, value):
    sets = make_sets()
    sets[0][19, 2] = value
    with pytest.raises(UserError, match=r"(row|image) 19\b"):
        (BY_NAME | BY_CLASS)[name](*sets)


@pytest.mark.parametrize("name", [*SEARCHES, "classification_baselines"])
def test_one_in_the_database_is_refused_naming_its_row(name):
    sets = make_sets()
    sets[2][31, 5] = np.nan
    with pytest.raises(UserError, match=r"row 31\b"):
        (BY_NAME | BY_CLASS)[name](*sets)


@pytest.mark.parametrize("name", BY_NAME)
def test_fault_1_labels_beyond_65536_are_names_and_nothing_more(name):
    queries, query_labels, database, database_labels = make_sets()
    # Neighbors that float16 (2,048), int16 (32,768) or uint16 (65,536) would take for one or for others.
    ids = np.array([2048, 2049, 32_768, 65_536 + 2048, 65_536 + 2049, 2**40 + 32_768])
    plain = BY_NAME[name](queries, query_labels, database, database_labels)
    renamed = BY_NAME[name](queries, ids[query_labels], database, ids[database_labels])
    assert untimed(renamed) == untimed(plain)


def test_fault_1_so_are_those_of_single_classes_and_superclasses():
    labels = np.array([2048, 2049, 65_536, 65_537, 69_999])
    predictions = np.array([labels, [2049, 2049, 65_537, 65_537, 4463]])
    names = [f"c{i}" for i in range(70_000)]
    found = {(row.metric, row.dim): row.value for row in per_class(predictions, labels, DIMS, names, SOURCE, "MRL")}
    assert [found[f"top_1 of class c{label}", 8] for label in labels] == [0, 1, 0, 1, 0]
    superclass_of = np.zeros(70_000, dtype=np.int64)
    superclass_of[[2049, 65_537]] = 1
    rows = hierarchy(predictions, labels, DIMS, Hierarchy(superclass_of, ("even", "odd")), SOURCE, "MRL")
    assert {row.value for row in rows if (row.metric, row.dim) == ("superclass_top_1", 8)} == {3 / 5}
    assert {row.value for row in oracle(predictions, labels, DIMS, SOURCE, "MRL") if row.metric == "top_1"} == {1}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_k_larger_than_the_database_is_left_out_and_what_can_be_said_is(name):
    with pytest.warns(UserWarning, match="10") if name != "adaptive_retrieval" else np.errstate():
        rows = SEARCHES[name](*make_sets(num_database=9))
    assert {row.metric for row in rows} == {"top_1"}


@pytest.mark.parametrize("name", SEARCHES)
def test_classes_of_one_image_of_none_and_of_fewer_than_k(name):
    queries, query_labels, database, database_labels = make_sets()
    keep = np.flatnonzero(database_labels != 0)  # none of class 0,
    keep = np.setdiff1d(keep, np.flatnonzero(database_labels == 1)[1:])  # one of class 1
    rows = SEARCHES[name](queries, query_labels, database[keep], database_labels[keep])
    assert all(0 <= row.value <= 1 and row.n == 48 for row in rows)
    only = SEARCHES[name](queries[:1], query_labels[:1], database[keep], database_labels[keep])
    assert {row.value for row in only} == {0}, "what is not there is never found"


def test_a_class_without_images_has_no_row_and_one_image_is_a_class():
    labels = np.array([0, 0, 2])
    rows = per_class(np.array([[0, 1, 2]]), labels, (8,), ["cat", "dog", "oak"], SOURCE, "FF")
    assert {(row.metric, row.n) for row in rows if row.dim} == {("top_1 of class cat", 2), ("top_1 of class oak", 1)}
    classifier = [(torch.eye(6, 8), torch.zeros(6))]
    vectors = np.eye(6, 8, dtype=np.float32)[labels]
    assert {row.value for row in classification(vectors, labels, classifier, SOURCE, "FF")} == {1}
