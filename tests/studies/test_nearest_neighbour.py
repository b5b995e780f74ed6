import numpy as np
import pytest

from mrl.errors import UserError
from mrl.results import Source
from mrl.studies.nearest_neighbour import nearest_neighbour

SOURCE = Source("digits", "some_run", 3, 32, 28, False)


def values(rows):
    return {(row.method, row.dim): row.value for row in rows}


def test_worked_by_hand():
    database = np.array([[1.0, 0.0], [1.0, 2.0], [-1.0, 0.0]])
    queries = np.array([[5.0, 0.1], [0.1, 5.0], [-1.0, 0.2]])
    # 1 dim: signs are all there is. Queries 0 and 1 meet images 0 and 1 at the same cosine, and the first counts.
    # 2 dims: every query has its own nearest image.
    rows = nearest_neighbour(queries, np.array([7, 8, 9]), database, np.array([7, 8, 9]), {"MRL": [1, 2]}, SOURCE)
    assert values(rows) == {("MRL", 1): 2 / 3, ("MRL", 2): 1.0}
    assert [(row.study, row.metric, row.n, row.cost) for row in rows] == [
        ("nearest_neighbour", "top_1", 3, 3e-6),
        ("nearest_neighbour", "top_1", 3, 6e-6),
    ]


def test_equals_a_loop_over_queries():
    rng = np.random.default_rng(0)
    database, queries = rng.standard_normal((301, 16)), rng.standard_normal((57, 16))
    database_labels, query_labels = rng.integers(4, size=301), rng.integers(4, size=57)
    rows = nearest_neighbour(queries, query_labels, database, database_labels, {"MRL": [4, 8, 16]}, SOURCE)
    for dim in (4, 8, 16):
        correct = 0
        for query, label in zip(queries[:, :dim], query_labels, strict=True):
            cosines = [query @ other / np.linalg.norm(other) for other in database[:, :dim]]
            correct += database_labels[np.argmax(cosines)] == label
        assert values(rows)["MRL", dim] == correct / 57


def test_each_method_gets_the_sizes_it_asks_for_from_one_search():
    vectors = np.random.default_rng(0).standard_normal((20, 8))
    labels = np.arange(20)
    rows = nearest_neighbour(vectors, labels, vectors, labels, {"FF": [8], "FF truncated": [2, 8]}, SOURCE)
    assert values(rows) == {("FF", 8): 1.0, ("FF truncated", 2): 1.0, ("FF truncated", 8): 1.0}


def test_fault_1_labels_beyond_65536_stay_distinct():
    rng = np.random.default_rng(0)
    database = rng.standard_normal((4202, 8)).astype(np.float32)
    labels = np.arange(4202) + 65_536
    wrong = labels[::-1].copy()
    assert values(nearest_neighbour(database, labels, database, labels, {"FF": [8]}, SOURCE)) == {("FF", 8): 1.0}
    assert values(nearest_neighbour(database, wrong, database, labels, {"FF": [8]}, SOURCE)) == {("FF", 8): 0.0}


def test_a_size_beyond_the_width_is_refused():
    with pytest.raises(UserError, match="9"):
        nearest_neighbour(np.ones((1, 8)), np.zeros(1), np.ones((1, 8)), np.zeros(1), {"FF": [9]}, SOURCE)
