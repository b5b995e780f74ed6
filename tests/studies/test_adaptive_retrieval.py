import numpy as np
import pytest

from mrl.results import Source
from mrl.retrieval.rerank import funnel_search
from mrl.studies import adaptive_retrieval as module
from mrl.studies.adaptive_retrieval import ablation, adaptive_retrieval, funnels, pairs
from mrl.studies.retrieval import retrieval

SOURCE = Source("digits", "some_run", 3, 32, 28, False)
PAPER = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
DIMS = (4, 8, 16, 32)


def make_sets(database_size=450, num_queries=31):
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((9, 32))
    labels = rng.integers(9, size=database_size), rng.integers(9, size=num_queries)
    database, queries = (centers[of] + 1.5 * rng.standard_normal((len(of), 32)) for of in labels)
    return queries.astype(np.float32), labels[1], database.astype(np.float32), labels[0]


@pytest.fixture(scope="module")
def sets():
    return make_sets()


@pytest.fixture(scope="module")
def rows(sets):
    return adaptive_retrieval(*sets, DIMS, SOURCE, "MRL")


def key(row):
    return row.study, row.shortlist_dim, row.shortlist_size, row.rerank_dim, row.metric


def order_by_cosine(query, database, indices, dim):
    unit = database[indices, :dim].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return [indices[place] for place in np.argsort(-unit @ query[:dim], kind="stable")]


def slow_values(queries, query_labels, database, database_labels, dim, stages):
    """top_1 and map@10 of one plan, a query at a time, with nothing shared."""
    top_1, average_precision = 0.0, 0.0
    for query, label in zip(queries.astype(np.float64), query_labels, strict=True):
        found = order_by_cosine(query, database, list(range(len(database))), dim)
        for rerank_dim, length in stages:
            found = order_by_cosine(query, database, found[:length], rerank_dim)
        hits = [database_labels[i] == label for i in found[:10]]
        top_1 += hits[0]
        relevant = sum(database_labels == label)
        average_precision += sum(sum(hits[:i]) / i for i in range(1, 11) if hits[i - 1]) / min(10, relevant)
    return {"top_1": top_1 / len(queries), "map@10": average_precision / len(queries)}


def test_every_row_equals_a_loop_over_queries_with_nothing_shared(sets, rows):
    plans = {("adaptive_retrieval", *plan) for plan in pairs(DIMS, 450) + ablation(DIMS, 450)}
    plans |= {("funnel_retrieval", *plan) for plan in funnels(DIMS, 450)}
    assert len(plans) == 10 + 2 + 4
    found = {key(row): row.value for row in rows}
    assert len(found) == len(rows) == 2 * len(plans)
    for study, dim, stages in plans:
        for metric, value in slow_values(*sets, dim, stages).items():
            assert found[study, dim, stages[0][1], stages[-1][0], metric] == pytest.approx(value)


def test_fault_2_no_configuration_starts_from_the_order_that_another_left(sets, rows):
    found = {key(row): row.value for row in rows}
    for dim, stages in funnels(DIMS, 450):
        indices, _ = funnel_search(sets[0], sets[2], dim, stages)
        top_1 = (sets[3][indices[:, 0]] == sets[1]).mean()
        assert found["funnel_retrieval", dim, stages[0][1], DIMS[-1], "top_1"] == pytest.approx(top_1)


def test_without_reranking_it_is_plain_retrieval(sets, rows):
    plain = {(row.dim, row.metric): row.value for row in retrieval(*sets, {"MRL": DIMS}, SOURCE)}
    same_dim = [row for row in rows if row.shortlist_dim == row.rerank_dim]
    assert len(same_dim) == 2 * len(DIMS)
    assert all(row.value == plain[row.rerank_dim, row.metric] for row in same_dim)


def test_a_shortlist_of_everything_is_full_width_search():
    sets = make_sets(database_size=150)
    rows = adaptive_retrieval(*sets, DIMS, SOURCE, "MRL")
    plain = {row.metric: row.value for row in retrieval(*sets, {"MRL": [32]}, SOURCE)}
    whole = [row for row in rows if row.rerank_dim == 32 and row.shortlist_size == 150]
    assert len(whole) == 2 * len(DIMS)
    assert all(row.value == pytest.approx(plain[row.metric]) for row in whole)
    assert not any(row.study == "funnel_retrieval" for row in rows), "no funnel fits 150 images"


def test_fault_26_multiply_adds_and_milliseconds_are_two_numbers(rows):
    costs = {key(row)[:4]: row.cost for row in rows}
    assert costs["adaptive_retrieval", 4, 200, 32] == pytest.approx((450 * 4 + 200 * 32) / 1e6)
    assert costs["adaptive_retrieval", 8, 200, 8] == pytest.approx((450 * 8 + 200 * 8) / 1e6)
    assert costs["funnel_retrieval", 4, 200, 32] == pytest.approx((450 * 4 + 200 * 8 + 100 * 16 + 10 * 32) / 1e6)
    assert all(row.ms_per_query > 0 for row in rows)
    # Of two rows from one search, that with more to rerank took longer than the one with nothing.
    times = {key(row)[:4]: row.ms_per_query for row in rows}
    assert times["adaptive_retrieval", 4, 200, 32] > times["adaptive_retrieval", 4, 200, 4]
    assert {(row.method, row.dim, row.n) for row in rows} == {("MRL", None, 31)}


def test_the_papers_configurations():
    assert len(pairs(PAPER, 1_281_167)) == 45
    assert ablation(PAPER, 1_281_167) == [(16, ((2048, size),)) for size in (100, 400, 800, 1600, 2048)]
    assert ablation([8, 16], 1000) == ablation([16], 1000) == ablation([8, 64], 1000) == []
    of_16 = [stages for dim, stages in funnels(PAPER, 1_281_167) if dim == 16]
    assert of_16[0] == ((32, 200), (64, 100), (128, 50), (256, 25), (2048, 10))
    assert [tuple(length for _, length in stages) for stages in of_16] == [
        (200, 100, 50, 25, 10),
        (400, 200, 50, 25, 10),
        (800, 400, 200, 50, 10),
    ]
    assert [dim for dim, _ in funnels(PAPER, 1_281_167)] == [8] * 3 + [16] * 3 + [32] * 3


@pytest.mark.parametrize("nesting_list", [(64,), (8, 64), (8, 16, 64), (12, 24, 48, 96, 192, 384, 768), (8, 212, 416)])
@pytest.mark.parametrize("database_size", [5, 100, 250, 5000])
def test_any_nesting_list_gives_funnels_that_widen_and_shorten(nesting_list, database_size):
    for dim, stages in funnels(nesting_list, database_size):
        dims, lengths = zip(*stages, strict=True)
        assert len(stages) >= 2
        assert list(dims) == sorted(set(dims)) and dims[0] > dim and dims[-1] == nesting_list[-1]
        assert list(lengths) == sorted(set(lengths), reverse=True)
        assert lengths[0] <= database_size and lengths[-1] == 10
    plans = (
        pairs(nesting_list, database_size)
        + ablation(nesting_list, database_size)
        + funnels(nesting_list, database_size)
    )
    assert len(set(plans)) == len(plans), "nothing is measured twice"


def test_a_database_of_fewer_than_ten_images_has_top_1_alone():
    rows = adaptive_retrieval(*make_sets(database_size=7), DIMS, SOURCE, "MRL")
    assert {row.metric for row in rows} == {"top_1"}
    assert {row.shortlist_size for row in rows} == {7}


def test_fault_1_labels_are_names_of_any_size_and_what_is_not_in_the_database_is_never_found(sets):
    queries, query_labels, database, database_labels = sets
    # Neighbors that float16 (2,048), int16 (32,768) or uint16 (65,536) would confuse.
    names = np.array([2048, 2049, 32_768, 67_584, 67_585, 98_304, 2**40 + 2048, 2**40 + 2049, 7])
    renamed = adaptive_retrieval(queries, names[query_labels], database, names[database_labels], DIMS, SOURCE, "MRL")
    plain = adaptive_retrieval(*sets, DIMS, SOURCE, "MRL")
    assert [row.value for row in renamed] == [row.value for row in plain]
    absent = adaptive_retrieval(queries, np.full(31, 99), database, database_labels, DIMS, SOURCE, "MRL")
    assert {(row.value, row.n) for row in absent} == {(0, 31)}


def test_all_queries_are_used_unless_fewer_are_asked_for(sets):
    queries, query_labels, database, database_labels = sets
    fewer = adaptive_retrieval(*sets, DIMS, SOURCE, "MRL", max_queries=3)
    alone = adaptive_retrieval(queries[::15], query_labels[::15], database, database_labels, DIMS, SOURCE, "MRL")
    assert [(row.value, row.n) for row in fewer] == [(row.value, row.n) for row in alone]
    assert {row.n for row in fewer} == {3}


@pytest.mark.parametrize(("durations", "kept"), [([0.1, 0.3, 0.2, 9], 0.1), ([0.6, 0.5, 9], 0.5), ([11.0, 9], 11.0)])
def test_a_short_time_is_the_best_of_three_and_a_long_one_is_measured_once(monkeypatch, durations, kept):
    now, left = [0.0], list(durations)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def search():
        now[0] += left.pop(0)
        return np.zeros(1)

    assert module._timed(search)[1] == pytest.approx(kept)
    assert left == [9]  # was not run again
