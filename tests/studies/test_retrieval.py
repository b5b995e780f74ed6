import numpy as np
import pytest

from mrl.results import Source
from mrl.studies.retrieval import interpolated_dims, retrieval, thin_indices

SOURCE = Source("digits", "some_run", 3, 32, 28, False)
DIMS = {"MRL": [4, 8, 12, 16]}


def values(rows):
    return {(row.method, row.metric, row.dim): row.value for row in rows}


def top_1_by_size(rows):
    return {(row.method, row.dim): row.value for row in rows if row.metric == "top_1"}


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


@pytest.mark.parametrize("k", [10, 100])
def test_equals_a_loop_over_queries(sets, k):
    found = values(retrieval(*sets, DIMS, SOURCE))
    assert len(found) == 4 * (1 + 4 * 4)
    for dim in DIMS["MRL"]:
        for metric, value in one_query_at_a_time(*sets, dim, k).items():
            assert found["MRL", metric, dim] == pytest.approx(value)


def test_a_smaller_k_is_the_start_of_the_same_search(sets):
    together, alone = (values(retrieval(*sets, DIMS, SOURCE, ks=ks)) for ks in ((10, 25, 50, 100), (25,)))
    assert {key: together[key] for key in alone} == pytest.approx(alone)


def test_fault_12_recall_and_average_precision_know_how_many_images_are_relevant(sets):
    queries, query_labels, database, database_labels = sets
    rare, absent = query_labels == 4, query_labels == 5
    # A rare class whose three images are found first is retrieved perfectly, though k is 10.
    same = np.concatenate([database[:3], database[:2]])
    found = values(retrieval(same, query_labels[rare], same[:3], database_labels[:3], {"MRL": [16]}, SOURCE, ks=(3,)))
    assert found["MRL", "map@3", 16] == found["MRL", "recall@3", 16] == 1
    few = np.concatenate([np.tile(queries[:1], (3, 1)), -np.tile(queries[:1], (20, 1))])
    found = values(
        retrieval(queries[:1], np.array([4]), few, np.array([4] * 3 + [0] * 20), {"MRL": [16]}, SOURCE, ks=(10,))
    )
    assert found["MRL", "map@10", 16] == found["MRL", "recall@10", 16] == 1
    assert found["MRL", "precision@10", 16] == pytest.approx(0.3)
    # A class that is not in the database counts as nothing found, among the same number of queries.
    rows = retrieval(queries[absent], query_labels[absent], database, database_labels, DIMS, SOURCE)
    assert {row.value for row in rows} == {0} and {row.n for row in rows} == {5}


def test_order_of_the_queries_and_of_the_database_changes_nothing(sets):
    queries, query_labels, database, database_labels = sets
    rng = np.random.default_rng(1)
    q, n = rng.permutation(len(queries)), rng.permutation(len(database))
    shuffled = queries[q], query_labels[q], database[n], database_labels[n]
    assert values(retrieval(*shuffled, DIMS, SOURCE)) == pytest.approx(values(retrieval(*sets, DIMS, SOURCE)))


def test_worked_by_hand():
    database = np.array([[1.0, 0.0], [1.0, 2.0], [-1.0, 0.0]])
    queries = np.array([[5.0, 0.1], [0.1, 5.0], [-1.0, 0.2]])
    labels = np.array([7, 8, 9])
    # 1 dim: signs are all there is. Queries 0 and 1 meet images 0 and 1 at the same cosine, and the first counts.
    # 2 dims: every query has its own nearest image.
    rows = retrieval(queries, labels, database, labels, {"MRL": [1, 2]}, SOURCE, ks=(2,))
    # Each has one relevant image, which at 1 dim stands first, second and first.
    assert values(rows) == {
        ("MRL", "top_1", 1): 2 / 3,
        ("MRL", "top_2", 1): 1.0,
        ("MRL", "map@2", 1): pytest.approx((1 + 1 / 2 + 1) / 3),
        ("MRL", "precision@2", 1): 1 / 2,
        ("MRL", "recall@2", 1): 1.0,
        ("MRL", "top_1", 2): 1.0,
        ("MRL", "top_2", 2): 1.0,
        ("MRL", "map@2", 2): 1.0,
        ("MRL", "precision@2", 2): 1 / 2,
        ("MRL", "recall@2", 2): 1.0,
    }
    assert {(row.study, row.n, row.dim, row.cost) for row in rows} == {
        ("retrieval", 3, 1, 3e-6),
        ("retrieval", 3, 2, 6e-6),
    }


def test_each_method_gets_the_sizes_it_asks_for_from_one_search():
    vectors = np.random.default_rng(0).standard_normal((20, 8))
    labels = np.arange(20)
    rows = retrieval(vectors, labels, vectors, labels, {"FF": [8], "FF truncated": [2, 8]}, SOURCE, ks=(10,))
    assert top_1_by_size(rows) == {("FF", 8): 1.0, ("FF truncated", 2): 1.0, ("FF truncated", 8): 1.0}


def test_fault_1_labels_beyond_65536_stay_distinct():
    database = np.random.default_rng(0).standard_normal((4202, 8)).astype(np.float32)
    labels = np.arange(4202) + 65_536
    for of_queries, value in ((labels, 1.0), (labels[::-1].copy(), 0.0)):
        rows = retrieval(database, of_queries, database, labels, {"FF": [8]}, SOURCE, ks=())
        assert top_1_by_size(rows) == {("FF", 8): value}


def test_a_k_above_the_size_of_the_database_is_left_out_and_said_once(sets):
    queries, query_labels, database, database_labels = sets
    with pytest.warns(UserWarning, match=r"has 30 images.*k = 50, 100 are left out") as said:
        rows = retrieval(queries, query_labels, database[:30], database_labels[:30], DIMS, SOURCE)
    assert len(said) == 1
    assert {row.metric.partition("@")[2] for row in rows} == {"", "10", "25"}


@pytest.mark.parametrize(
    ("nesting_list", "between"),
    [
        ((8, 16, 32, 64, 128, 256, 512, 1024, 2048), (12, 24, 48, 96, 192, 384, 768, 1536)),
        ((12, 24, 48), (18, 36)),
        ((8, 212, 416), (110, 314)),
        ((3, 4, 6), (5,)),
        ((64,), ()),
    ],
)
def test_interpolated_sizes_lie_between_trained_ones_and_are_the_papers_where_the_list_is(nesting_list, between):
    assert interpolated_dims(nesting_list) == between


def test_indices_are_evenly_spread():
    assert thin_indices(11, 3).tolist() == [0, 5, 10]
    assert thin_indices(4, 9).tolist() == thin_indices(4, None).tolist() == [0, 1, 2, 3]


def test_max_queries_takes_evenly_spread_ones(sets):
    queries, query_labels, database, database_labels = sets
    some = np.array([0, 28, 56])
    expected = retrieval(queries[some], query_labels[some], database, database_labels, DIMS, SOURCE)
    assert retrieval(*sets, DIMS, SOURCE, max_queries=3) == expected
    assert {row.n for row in expected} == {3}
