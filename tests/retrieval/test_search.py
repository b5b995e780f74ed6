import tracemalloc

import numpy as np
import pytest
import torch

from mrl.errors import UserError
from mrl.retrieval.search import count_zero_prefixes, describe_zero_prefixes, exact_search


def cosines(queries, database, dim):
    queries, database = (np.asarray(vectors, dtype=np.float64)[:, :dim] for vectors in (queries, database))
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    database = database / np.linalg.norm(database, axis=1, keepdims=True)
    return queries @ database.T


def brute_force(queries, database, k, dim):
    """Cosine of every pair in float64, then a stable sort: slow and obvious."""
    scores = cosines(queries, database, dim)
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return indices, np.take_along_axis(scores, indices, axis=1)


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    database = rng.standard_normal((1003, 48)) * rng.uniform(0.1, 10, (1003, 1))
    return rng.standard_normal((37, 48)).astype(np.float32), database.astype(np.float32)


@pytest.mark.parametrize("k", [1, 10, 1003])
@pytest.mark.parametrize(("database_rows", "query_rows"), [(8192, 1024), (200, 5), (65, 36)])
def test_fault_19_equals_brute_force_at_block_sizes_that_do_not_divide(vectors, k, database_rows, query_rows):
    found = exact_search(*vectors, k, [48, 3, 8], database_rows=database_rows, query_rows=query_rows)
    assert list(found) == [48, 3, 8]
    for dim, (indices, scores) in found.items():
        expected_indices, expected_scores = brute_force(*vectors, k, dim)
        assert (indices.dtype, scores.dtype) == (np.int64, np.float32)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
        # Where float64 sees a difference below the resolution of float32, two neighbors may change places.
        np.testing.assert_allclose(
            np.take_along_axis(cosines(*vectors, dim), indices, axis=1), expected_scores, atol=1e-6
        )
        assert (indices == expected_indices).mean() > 0.999
        assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("database_rows", [64, 100, 777, 8192])
@pytest.mark.parametrize("k", [1, 7, 250])
def test_fault_25_equal_scores_come_by_lower_index(k, database_rows):
    rng = np.random.default_rng(1)
    originals = rng.standard_normal((7, 100)).astype(np.float32)
    which = rng.integers(7, size=2001)
    queries = rng.standard_normal((13, 100)).astype(np.float32)
    found = exact_search(queries, originals[which], k, [8, 100], database_rows=database_rows, query_rows=5)
    for dim, (indices, scores) in found.items():
        order, of_originals = brute_force(queries, originals, 7, dim)
        for query in range(len(queries)):
            expected = np.concatenate([np.flatnonzero(which == original) for original in order[query]])[:k]
            np.testing.assert_array_equal(indices[query], expected)
            np.testing.assert_allclose(
                scores[query], of_originals[query][np.argsort(order[query])][which[expected]], atol=1e-6
            )
            assert len(np.unique(scores[query])) == len(np.unique(which[expected])), "twins score exactly the same"


@pytest.mark.parametrize("metric", ["cosine", "inner product"])
def test_all_zero_prefixes_are_counted_in_a_warning(vectors, metric, recwarn):
    queries, database = (each.copy() for each in vectors)
    exact_search(queries, database, 5, [4, 8], metric=metric)
    assert not recwarn
    queries[[1, 2], :4], queries[1, :8], database[7, :4] = 0, 0, 0
    num_queries, num_vectors = f"{len(queries):,}", f"{len(database):,}"
    counts = f"at 4 dims 2 of {num_queries} queries and 1 of {num_vectors} vectors, "
    counts += f"at 8 dims 1 of {num_queries} queries and 0 of {num_vectors} vectors"
    with pytest.warns(UserWarning, match=f"all zero.*: {counts}$"):
        found = exact_search(queries, database, 5, [4, 8], metric=metric, query_rows=2, database_rows=64)
    assert not found[8][1][1].any() and found[8][1][2].any()
    assert count_zero_prefixes(queries, [8, 4]) == {4: 2, 8: 1}
    assert describe_zero_prefixes(database, [4, 8]) == (
        f"all-zero prefixes: 1 at 4 dims, of {num_vectors} images; at these sizes they have no neighbors"
    )
    assert describe_zero_prefixes(database, [8]) == ""


def test_arrays_tensors_and_half_precision_give_the_same_and_stay_as_they_were(vectors):
    queries, database = vectors[0].astype(np.float16), vectors[1].astype(np.float16)
    before, expected = database.copy(), brute_force(queries, database, 5, 8)[0]
    for to in (np.asarray, torch.from_numpy, lambda given: given.astype(np.float32)):
        np.testing.assert_array_equal(
            exact_search(to(queries), to(database), 5, [8], database_rows=128)[8][0], expected
        )
    np.testing.assert_array_equal(database, before)
    assert exact_search(queries[:0], database, 5, [8])[8][0].shape == (0, 5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_cosines_of_shared_products_are_as_exact_as_float32_allows(scale):
    rng = np.random.default_rng(3)
    # The coordinates grow, so that a small prefix would be lost in the rounding of a larger one.
    growing = np.geomspace(0.01, 100, 512) * scale
    queries, database = (np.abs(rng.standard_normal((n, 512))) * growing for n in (20, 900))
    found = exact_search(queries.astype(np.float32), database.astype(np.float32), 900, [8, 64, 512])
    for dim, (indices, scores) in found.items():
        expected = np.take_along_axis(cosines(queries, database, dim), indices, axis=1)
        np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_of_a_mapped_file_one_block_at_a_time_is_in_memory(vectors, tmp_path, dtype):
    queries, database = vectors[0], np.tile(vectors[1].astype(dtype), (100, 1))
    np.save(tmp_path / "database.npy", database)
    mapped = np.load(tmp_path / "database.npy", mmap_mode="r")
    tracemalloc.start()
    found = exact_search(queries, mapped, 10, [48], database_rows=2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # numpy's own memory, where a copy of all 100,300 rows would show: 19 MB in float32.
    assert peak < 8e6
    np.testing.assert_array_equal(found[48][0], exact_search(queries, database, 10, [48])[48][0])


@pytest.mark.parametrize(("k", "dims", "named"), [(1004, [8], "1004.*1003"), (0, [8], "k is 0"), (1, [49], "49")])
def test_refuses_what_does_not_fit_the_database(vectors, k, dims, named):
    with pytest.raises(UserError, match=named):
        exact_search(*vectors, k, dims)


def test_refuses_vectors_that_are_not_finite_by_their_position(vectors):
    queries, database = vectors
    database[700, 40] = np.nan
    with pytest.raises(UserError, match="database vector 700 holds NaN"):
        exact_search(queries, database, 1, [8, 41], database_rows=64)
    exact_search(queries, database, 1, [8, 40], database_rows=64)  # coordinates beyond the largest size do not matter
    database[9] = 0
    database[9, [0, 8]] = 1.5e19  # squared 2.25e38; float32 ends at 3.4e38
    exact_search(queries, database, 1, [8])
    with pytest.raises(UserError, match="database vector 9 .* too long"):
        exact_search(queries, database[:700], 1, [8, 16])
    queries[20, 0] = np.inf
    with pytest.raises(UserError, match="query vector 20 "):
        exact_search(queries, database, 1, [8], query_rows=8)


@pytest.mark.parametrize("k", [1, 10, 70, 640])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal", "few values"])
def test_scores_in_any_order_are_those_of_a_stable_sort(k, order):
    scores = np.random.default_rng(0).standard_normal(640).astype(np.float32)
    scores = {
        "random": scores,
        "ascending": np.sort(scores),
        "descending": -np.sort(-scores),
        "equal": np.zeros_like(scores),
        "few values": np.round(scores),  # 0.0 and -0.0 too, which are equal
    }[order]
    # At 1 dim the inner products with the query 1 are the database itself.
    [(indices, found)] = exact_search(
        np.ones((1, 1)), scores[:, None], k, [1], metric="inner product", database_rows=128
    ).values()
    expected = np.argsort(-scores, kind="stable")[:k]
    np.testing.assert_array_equal(indices, expected[None])
    np.testing.assert_array_equal(found, scores[expected][None])


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(vectors):
    on_gpu, on_cpu = (exact_search(*vectors, 10, [8, 48], device=d, database_rows=200) for d in ("cuda", "cpu"))
    for dim in (8, 48):
        np.testing.assert_array_equal(on_gpu[dim][0], on_cpu[dim][0])
        np.testing.assert_allclose(on_gpu[dim][1], on_cpu[dim][1], atol=1e-6)
