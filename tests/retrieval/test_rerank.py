import itertools

import numpy as np
import pytest
import torch

import mrl
from mrl.errors import UserError
from mrl.retrieval import rerank as module
from mrl.retrieval.rerank import funnel, funnel_search, rerank


def slow_rerank(queries, database, shortlist, dim):
    """One query and one neighbor at a time, in float64."""
    orders = []
    for query, found in zip(queries.astype(np.float64), shortlist, strict=True):
        q = query[:dim] / np.linalg.norm(query[:dim])
        scores = {}
        for row in found.tolist():
            vector = database[row, :dim].astype(np.float64)
            scores[row] = q @ (vector / np.linalg.norm(vector))
        orders.append(sorted(found.tolist(), key=lambda row: (-scores[row], row)))
    return np.array(orders)


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    database = rng.standard_normal((500, 48)) * rng.uniform(0.1, 10, (500, 1))
    return rng.standard_normal((23, 48)).astype(np.float32), database.astype(np.float32)


@pytest.fixture
def shortlist():
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(500)[:40] for _ in range(23)])


@pytest.mark.parametrize("dim", [1, 3, 8, 48])
@pytest.mark.parametrize("block_bytes", [2**23, 30_000, 1])
@pytest.mark.parametrize("max_bytes", [2**29, 20_000, 1])
def test_equals_a_loop_whatever_is_looked_at_together(vectors, shortlist, dim, block_bytes, max_bytes, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(module, "_MAX_BYTES", max_bytes)
    if dim == 1:  # all cosines are 1 or -1 up to rounding
        vectors = [np.abs(np.sign(each)) * 2.0 for each in vectors]
    np.testing.assert_array_equal(rerank(*vectors, shortlist, dim), slow_rerank(*vectors, shortlist, dim))


@pytest.mark.parametrize("block_bytes", [2**23, 1])
@pytest.mark.parametrize("num_queries", [1, 4])
def test_a_list_may_name_a_vector_twice(vectors, block_bytes, num_queries, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    queries, database = vectors[0][:num_queries], vectors[1]
    shortlist = np.tile([[3, 7, 3, 3, 499, 7]], (num_queries, 1))
    np.testing.assert_array_equal(
        rerank(queries, database, shortlist, 48), slow_rerank(queries, database, shortlist, 48)
    )


def test_fault_2_the_shortlist_stays_as_it_is_and_nothing_is_shared_with_it(vectors, shortlist):
    given = shortlist.copy()
    given.setflags(write=False)
    first = rerank(*vectors, given, 48)
    assert not np.shares_memory(first, given)
    np.testing.assert_array_equal(given, shortlist)
    # A second funnel from the same table finds what it finds alone.
    alone = funnel(*vectors, shortlist.copy(), [(8, 40), (48, 10)])
    shared = shortlist.copy()
    funnel(*vectors, shared, [(48, 40), (16, 20)])
    np.testing.assert_array_equal(funnel(*vectors, shared, [(8, 40), (48, 10)])[0], alone[0])


@pytest.mark.parametrize("block_bytes", [2**23, 10_000])
def test_fault_25_equal_scores_come_by_lower_index(shortlist, block_bytes, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(2)
    for width in (7, 64, 100):
        which = rng.integers(5, size=500)
        originals = rng.standard_normal((5, width)).astype(np.float32)
        queries = rng.standard_normal((23, width)).astype(np.float32)
        found = rerank(queries, originals[which], shortlist, width)
        for kinds, rows in zip(which[found], found, strict=True):
            runs = [
                [row for _, row in run] for _, run in itertools.groupby(zip(kinds, rows, strict=True), lambda x: x[0])
            ]
            assert len(runs) == len(set(kinds.tolist()))
            assert all(run == sorted(run) for run in runs)


def test_fault_19_the_prefix_is_taken_first_and_normalized_after(vectors, shortlist):
    changed = [each.copy() for each in vectors]
    for each in changed:
        each[:, 8:] *= np.linspace(-50, 50, 40)
    np.testing.assert_array_equal(rerank(*changed, shortlist, 8), rerank(*vectors, shortlist, 8))


def test_a_shortlist_of_everything_is_an_exact_search(vectors):
    everything = np.tile(np.arange(499, -1, -1), (23, 1))
    indices, scores = mrl.exact_search(*vectors, 500, [16])[16]
    found, found_scores = funnel(*vectors, everything, [(16, 500)])
    np.testing.assert_array_equal(found, indices)
    np.testing.assert_allclose(found_scores, scores, atol=1e-6)


def test_a_funnel_is_its_steps_by_hand(vectors):
    stages = [(8, 50), (16, 20), (48, 5)]
    indices, scores = funnel_search(*vectors, 4, stages)
    current = mrl.exact_search(*vectors, 50, [4])[4][0]
    for dim, length in stages:
        current = slow_rerank(*vectors, current[:, :length], dim)
    np.testing.assert_array_equal(indices, current)
    assert (indices.dtype, scores.dtype, scores.shape) == (np.int64, np.float32, (23, 5))
    assert (np.diff(scores) <= 0).all()


def test_arrays_tensors_half_precision_and_mapped_files_give_the_same(vectors, shortlist, tmp_path):
    queries, database = vectors[0], vectors[1].astype(np.float16)
    expected = slow_rerank(queries, database, shortlist, 16)
    np.save(tmp_path / "database.npy", database)
    mapped = np.load(tmp_path / "database.npy", mmap_mode="r")
    np.testing.assert_array_equal(rerank(queries, mapped, shortlist, 16), expected)
    as_tensors = rerank(torch.from_numpy(queries), torch.from_numpy(database), shortlist, 16)
    np.testing.assert_array_equal(as_tensors, expected)


def test_no_queries_and_empty_lists_are_ordered(vectors, shortlist):
    assert rerank(vectors[0][:0], vectors[1], shortlist[:0], 8).shape == (0, 40)
    assert rerank(*vectors, shortlist[:, :0], 8).shape == (23, 0)


def test_refuses_what_does_not_fit(vectors, shortlist):
    queries, database = vectors
    for wrong in (-1, 500):
        with pytest.raises(UserError, match=f"index {wrong};.*0 to 499"):
            rerank(*vectors, np.append(shortlist[:, 1:], np.full((23, 1), wrong), axis=1), 8)
    with pytest.raises(UserError, match="23 queries"):
        rerank(*vectors, shortlist[1:], 8)
    with pytest.raises(UserError, match="float64"):
        rerank(*vectors, shortlist.astype(float), 8)
    with pytest.raises(UserError, match="49"):
        rerank(*vectors, shortlist, 49)
    with pytest.raises(UserError, match="equal width"):
        rerank(queries[:, :40], database, shortlist, 8)
    for stages in ([], [(8, 20), (16, 30)], [(8, 41)], [(8, 0)]):
        with pytest.raises(UserError, match="stages"):
            funnel(*vectors, shortlist, stages)
    with pytest.raises(UserError, match="500 vectors"):
        funnel_search(*vectors, 8, [(16, 501)])


@pytest.mark.parametrize("max_bytes", [2**29, 1])
def test_a_vector_that_is_not_finite_is_refused_by_its_position(vectors, shortlist, max_bytes, monkeypatch):
    monkeypatch.setattr(module, "_MAX_BYTES", max_bytes)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1)
    queries, database = vectors
    wrong = database.copy()
    wrong[shortlist[3, 0], 5] = np.nan
    with pytest.raises(UserError, match=f"database vector {shortlist[3, 0]} holds"):
        rerank(queries, wrong, shortlist, 8)
    queries[20, 0] = np.inf
    with pytest.raises(UserError, match="query vector 20 holds"):
        rerank(queries, database, shortlist, 8)
