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


@pytest.mark.parametrize("dim", [1, 48])
@pytest.mark.parametrize(("block_bytes", "max_bytes"), [(2**23, 2**29), (30_000, 20_000), (1, 1)])
def test_equals_a_loop_whatever_is_looked_at_together(vectors, shortlist, dim, block_bytes, max_bytes, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(module, "_MAX_BYTES", max_bytes)
    if dim == 1:  # all cosines are 1 or -1 up to rounding
        vectors = [np.abs(np.sign(each)) * 2.0 for each in vectors]
    for lists in (shortlist, shortlist[:, [0, 1, 0, 0, 2, 1]]):  # the second name vectors several times
        np.testing.assert_array_equal(rerank(*vectors, lists, dim), slow_rerank(*vectors, lists, dim))


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
        originals, queries = (rng.standard_normal((n, width)).astype(np.float32) for n in (5, 23))
        scores = (queries @ (originals / np.linalg.norm(originals, axis=1, keepdims=True)).T)[:, which]
        lists = zip(scores, shortlist, strict=True)
        expected = [found[np.lexsort((found, -of_query[found]))] for of_query, found in lists]
        np.testing.assert_array_equal(rerank(queries, originals[which], shortlist, width), expected)


def test_a_funnel_is_its_steps_by_hand(vectors):
    stages = [(8, 500), (16, 20), (48, 5)]
    indices, scores = funnel_search(*vectors, 4, stages)
    current = mrl.exact_search(*vectors, 500, [4])[4][0]
    for dim, length in stages:
        current = slow_rerank(*vectors, current[:, :length], dim)
    np.testing.assert_array_equal(indices, current)
    assert (indices.dtype, scores.dtype, scores.shape) == (np.int64, np.float32, (23, 5))
    # Of everything, whatever the order, it is an exact search.
    found = funnel(*vectors, np.tile(np.arange(499, -1, -1), (23, 1)), [(48, 500)])
    expected = mrl.exact_search(*vectors, 500, [48])[48]
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


def test_arrays_tensors_half_precision_and_mapped_files_give_the_same(vectors, shortlist, tmp_path):
    queries, database = vectors[0], vectors[1].astype(np.float16)
    expected = slow_rerank(queries, database, shortlist, 16)
    np.save(tmp_path / "database.npy", database)
    mapped = np.load(tmp_path / "database.npy", mmap_mode="r")
    np.testing.assert_array_equal(rerank(queries, mapped, shortlist, 16), expected)
    as_tensors = rerank(torch.from_numpy(queries), torch.from_numpy(database), shortlist, 16)
    np.testing.assert_array_equal(as_tensors, expected)


def test_refuses_what_does_not_fit(vectors, shortlist):
    queries, database = vectors
    beyond = np.append(shortlist[:, 1:], np.full((23, 1), 500), axis=1)
    for given, lists, dim, message in (
        (vectors, beyond, 8, "index 500;.*0 to 499"),
        (vectors, -shortlist, 8, "0 to 499"),
        (vectors, shortlist[1:], 8, "23 queries"),
        (vectors, shortlist.astype(float), 8, "float64"),
        (vectors, shortlist, 49, "49"),
        ((queries[:, :40], database), shortlist, 8, "equal width"),
    ):
        with pytest.raises(UserError, match=message):
            rerank(*given, lists, dim)
    for stages in ([], [(8, 20), (16, 30)], [(8, 41)], [(8, 0)]):
        with pytest.raises(UserError, match="stages"):
            funnel(*vectors, shortlist, stages)
    with pytest.raises(UserError, match="500 vectors"):
        funnel_search(*vectors, 8, [(16, 501)])


def test_a_vector_that_is_not_finite_is_refused_by_its_position(vectors, shortlist, monkeypatch):
    monkeypatch.setattr(module, "_MAX_BYTES", 1)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1)
    queries, database = vectors
    wrong = database.copy()
    wrong[shortlist[3, 0], 5] = np.nan
    with pytest.raises(UserError, match=f"database vector {shortlist[3, 0]} holds"):
        rerank(queries, wrong, shortlist, 8)
    queries[20, 0] = np.inf
    with pytest.raises(UserError, match="query vector 20 holds"):
        rerank(queries, database, shortlist, 8)
