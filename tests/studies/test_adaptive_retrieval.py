from dataclasses import replace

import numpy as np
import pytest

from mrl.results import Source
from mrl.retrieval.metrics import hits, num_relevant, retrieval_metrics
from mrl.retrieval.rerank import funnel_search
from mrl.studies.adaptive_retrieval import ablation, adaptive_retrieval, describe_retrieval, funnels, pairs

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


def one_plan(queries, query_labels, database, database_labels, dim, stages):
    """top_1 and map@10 of a plan with nothing shared."""
    indices, _ = funnel_search(queries, database, dim, stages)
    relevant = num_relevant(query_labels, database_labels)
    found = retrieval_metrics(hits(indices[:, :10], query_labels, database_labels), relevant, [10])
    return {metric: found[metric] for metric in ("top_1", "map@10")}


def test_fault_2_no_row_depends_on_what_another_plan_left(sets, rows):
    plans = {("adaptive_retrieval", *plan) for plan in pairs(DIMS, 450) + ablation(DIMS, 450)}
    plans |= {("funnel_retrieval", *plan) for plan in funnels(DIMS, 450)}
    assert len(plans) == 10 + 2 + 4
    found = {key(row): row.value for row in rows}
    assert len(found) == len(rows) == 2 * len(plans)
    for study, dim, stages in plans:
        for metric, value in one_plan(*sets, dim, stages).items():
            assert found[study, dim, stages[0][1], stages[-1][0], metric] == pytest.approx(value)


def test_fault_26_multiply_adds_and_milliseconds_are_two_numbers(rows):
    costs = {key(row)[:4]: row.cost for row in rows}
    assert costs["adaptive_retrieval", 4, 200, 32] == pytest.approx((450 * 4 + 200 * 32) / 1e6)
    assert costs["funnel_retrieval", 4, 200, 32] == pytest.approx((450 * 4 + 200 * 8 + 100 * 16 + 10 * 32) / 1e6)
    # Of two rows from one search, that with more to rerank took longer than the one with nothing.
    times = {key(row)[:4]: row.ms_per_query for row in rows}
    assert times["adaptive_retrieval", 4, 200, 32] > times["adaptive_retrieval", 4, 200, 4] > 0
    assert {(row.method, row.dim, row.n) for row in rows} == {("MRL", None, 31)}


def test_the_papers_configurations():
    assert len(pairs(PAPER, 1_281_167)) == 45
    assert ablation(PAPER, 1_281_167) == [(16, ((2048, size),)) for size in (100, 400, 800, 1600, 2048)]
    assert ablation([8, 16], 1000) == ablation([16], 1000) == ablation([8, 64], 1000) == []
    found = funnels(PAPER, 1_281_167)
    assert [dim for dim, _ in found] == [8] * 3 + [16] * 3 + [32] * 3
    assert found[3] == (16, ((32, 200), (64, 100), (128, 50), (256, 25), (2048, 10)))
    assert found[5] == (16, ((32, 800), (64, 400), (128, 200), (256, 50), (2048, 10)))


@pytest.mark.parametrize("nesting_list", [(64,), (8, 64), (8, 16, 64), (12, 24, 48, 96, 192, 384, 768), (8, 212, 416)])
@pytest.mark.parametrize("database_size", [5, 100, 250, 5000])
def test_any_nesting_list_gives_funnels_that_widen_and_shorten(nesting_list, database_size):
    found = funnels(nesting_list, database_size)
    for dim, stages in found:
        dims, lengths = zip(*stages, strict=True)
        assert len(stages) >= 2
        assert list(dims) == sorted(set(dims)) and dims[0] > dim and dims[-1] == nesting_list[-1]
        assert list(lengths) == sorted(set(lengths), reverse=True)
        assert lengths[0] <= database_size and lengths[-1] == 10
    plans = pairs(nesting_list, database_size) + ablation(nesting_list, database_size) + found
    assert len(set(plans)) == len(plans), "nothing is measured twice"


def test_a_database_of_fewer_than_ten_images_has_top_1_alone():
    rows = adaptive_retrieval(*make_sets(database_size=7), DIMS, SOURCE, "MRL")
    assert {(row.study, row.metric, row.shortlist_size) for row in rows} == {("adaptive_retrieval", "top_1", 7)}


def test_the_sentence_is_of_single_searches_and_of_one_reranking(rows):
    values = {(4, 4): 0.2, (4, 32): 0.5, (8, 32): 0.63, (16, 32): 0.7, (32, 32): 0.64}
    told = [row for row in rows if row.metric == "map@10" and (row.shortlist_dim, row.rerank_dim) in values]
    told = [
        replace(row, value=values[row.shortlist_dim, row.rerank_dim] if row.shortlist_size == 200 else 0.01)
        for row in told
    ]
    said = describe_retrieval(told)
    assert "full width, 32 dims: 64.0%; at 4 dims 20.0%, and 50.0% if its best 200" in said
    assert "8 dims are the smallest searched size within 1 point" in said
