import numpy as np
import pytest

from mrl.results import Source
from mrl.studies.retrieval import interpolated_dims, retrieval, thin_indices

SOURCE = Source("digits", "some_run", 3, 32, 28, False)
DIMS = {"MRL": [4, 8, 12, 16]}


def values(rows):
    return {(row.method, row.metric, row.dim): row.value for row in rows}


@pytest.fixture
def sets():
    """57 queries of 6 classes in a database of 301 of 5: class 5 is not there and class 4 has 3 images."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((6, 16))
    database_labels = np.concatenate([np.full(3, 4), rng.integers(4, size=298)])
    query_labels = np.concatenate([np.full(5, 4), np.full(5, 5), rng.integers(4, size=47)])
    database = centers[database_labels] + rng.standard_normal((301, 16))
    queries = centers[query_labels] + rng.standard_normal((57, 16))
    return queries, query_labels, database, database_labels


def one_query_at_a_time(queries, query_labels, database, database_labels, dim, k):
    """Every metric, slow and obvious."""
    sums = dict.fromkeys(("top_1", f"top_{k}", f"map@{k}", f"precision@{k}", f"recall@{k}"), 0.0)
    for query, label in zip(queries[:, :dim], query_labels, strict=True):
        cosines = [query @ other / np.linalg.norm(other) / np.linalg.norm(query) for other in database[:, :dim]]
        hits = [database_labels[row] == label for row in sorted(range(len(cosines)), key=lambda row: -cosines[row])]
        relevant = sum(hits)
        sums["top_1"] += hits[0]
        sums[f"top_{k}"] += any(hits[:k])
        sums[f"precision@{k}"] += sum(hits[:k]) / k
        if relevant:
            sums[f"recall@{k}"] += sum(hits[:k]) / relevant
            sums[f"map@{k}"] += sum(sum(hits[:i]) / i for i in range(1, k + 1) if hits[i - 1]) / min(k, relevant)
    return {metric: total / len(queries) for metric, total in sums.items()}


@pytest.mark.parametrize("ks", [(10, 25, 50, 100), (25,)])
def test_equals_a_loop_over_queries(sets, ks):
    rows = retrieval(*sets, DIMS, SOURCE, ks=ks)
    found = values(rows)
    assert len(found) == 4 * (1 + 4 * len(ks))
    assert {(row.study, row.n, row.cost) for row in rows if row.dim == 8} == {("retrieval", 57, 301 * 8 / 1e6)}
    for dim in DIMS["MRL"]:
        for metric, value in one_query_at_a_time(*sets, dim, ks[-1]).items():
            assert found["MRL", metric, dim] == pytest.approx(value)


def test_each_method_gets_the_sizes_it_asks_for_from_one_search():
    vectors, labels = np.random.default_rng(0).standard_normal((20, 8)), np.arange(20)
    rows = retrieval(vectors, labels, vectors, labels, {"FF": [8], "FF truncated": [2, 8]}, SOURCE, ks=())
    assert values(rows) == dict.fromkeys(
        [("FF", "top_1", 8), ("FF truncated", "top_1", 2), ("FF truncated", "top_1", 8)], 1
    )


def test_a_k_above_the_size_of_the_database_is_left_out_and_said_once(sets):
    queries, query_labels, database, database_labels = sets
    with pytest.warns(UserWarning, match=r"has 30 images.*k = 50, 100 are left out") as said:
        rows = retrieval(queries, query_labels, database[:30], database_labels[:30], DIMS, SOURCE)
    assert len(said) == 1
    assert {row.metric.partition("@")[2] for row in rows} == {"", "10", "25"}


def test_interpolated_sizes_lie_between_trained_ones_and_indices_are_evenly_spread():
    of_paper = interpolated_dims((8, 16, 32, 64, 128, 256, 512, 1024, 2048))
    assert of_paper == (12, 24, 48, 96, 192, 384, 768, 1536)
    assert interpolated_dims((8, 212, 416)) == (110, 314)
    assert interpolated_dims((3, 4, 6)) == (5,) and interpolated_dims((64,)) == ()
    assert thin_indices(11, 3).tolist() == [0, 5, 10]
    assert thin_indices(4, 9).tolist() == thin_indices(4, None).tolist() == [0, 1, 2, 3]
