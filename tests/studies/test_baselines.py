import dataclasses

import numpy as np
import pytest
import torch

from mrl.errors import UserError
from mrl.results import Source
from mrl.studies import baselines, linear_probe
from mrl.studies.baselines import (
    classification_baselines,
    fit_linear_probe,
    low_rank,
    mean_rows,
    moments,
    principal_components,
    project,
    random_projection,
    retrieval_baselines,
    take_coordinates,
)
from mrl.studies.retrieval import retrieval

SOURCE = Source("digits", "ff", 3, 32, 28, False)
DIMS = (2, 4, 8, 16)
METHODS = ["FF PCA", "FF SVD", "FF random coordinates", "FF random projection"]


@pytest.fixture(scope="module")
def sets():
    """Ten classes in 32 dims, all of them informative; positive and off the origin, like pooled activations."""
    rng = np.random.default_rng(0)
    centers = 3 * rng.random((10, 32))
    labels = np.arange(600) % 10, np.arange(110) % 10
    database, queries = (np.abs(centers[of] + 0.5 * rng.standard_normal((len(of), 32))) for of in labels)
    return queries.astype(np.float32), labels[1], database.astype(np.float32), labels[0]


@pytest.fixture(scope="module")
def rows(sets):
    return retrieval_baselines(*sets, DIMS, SOURCE)


def values(rows, metric="top_1"):
    return {(row.method, row.dim): row.value for row in rows if row.metric == metric}


def test_fault_28_every_baseline_stands_beside_plain_truncation(sets, rows):
    assert set(values(rows)) == {(method, dim) for method in METHODS for dim in DIMS}
    truncated = retrieval(*sets, {"FF truncated": DIMS}, SOURCE, ks=(10,))
    one_method = [row for row in rows if row.method == "FF PCA"]
    assert [(row.study, row.metric, row.dim, row.n, row.cost) for row in one_method] == [
        (row.study, row.metric, row.dim, row.n, row.cost) for row in truncated
    ]


def test_a_correct_random_projection_is_far_from_chance_and_grows_with_its_size(sets):
    found = values(retrieval_baselines(*sets, (4, 16, 32), SOURCE, draws=5))
    of_size = [found["FF random projection", dim] for dim in (4, 16, 32)]
    assert of_size == sorted(of_size)
    [full] = values(retrieval(*sets, {"FF": [32]}, SOURCE)).values()
    assert of_size[-1] > full - 0.1 > 0.8, "chance is 0.1"


def test_random_projection_keeps_lengths_and_products_in_the_mean():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50))
    projected = project(np.stack([a, b]), random_projection(50, 20_000, rng))
    np.testing.assert_allclose(projected @ projected.T, np.array([[a @ a, a @ b], [a @ b, b @ b]]), atol=2)


def test_at_full_width_svd_and_coordinates_are_the_model_itself(sets):
    found = retrieval_baselines(*sets, [32], SOURCE, draws=2)
    own = retrieval(*sets, {"FF": [32]}, SOURCE, ks=(10,))
    for method in ("FF SVD", "FF random coordinates"):
        of_method = [row.value for row in found if row.method == method]
        assert of_method == pytest.approx([row.value for row in own], abs=1e-3)


def test_pca_and_svd_directions_are_numpys(sets):
    database = sets[2].astype(np.float64)
    mean, covariance = moments(database)
    np.testing.assert_allclose(mean, database.mean(0))
    np.testing.assert_allclose(covariance, np.cov(database.T, bias=True), atol=1e-5)
    for center, matrix in ((mean, covariance), (0 * mean, covariance + mean[:, None] * mean)):
        right = np.linalg.svd(database - center.numpy(), full_matrices=False)[2][:5]
        agreement = np.abs((right @ principal_components(matrix, 5).numpy()).diagonal())
        np.testing.assert_allclose(agreement, 1, atol=1e-3)


def test_moving_all_embeddings_changes_pca_nothing_and_turning_them_changes_neither_pca_nor_svd(sets, rows):
    queries, query_labels, database, database_labels = sets
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((32, 32)))[0].astype(np.float32)
    moved = retrieval_baselines(queries + 5, query_labels, database + 5, database_labels, DIMS, SOURCE, draws=1)
    turned = retrieval_baselines(queries @ turn, query_labels, database @ turn, database_labels, DIMS, SOURCE, draws=1)
    before = values(rows, "map@10")
    for dim in DIMS:
        assert values(moved, "map@10")["FF PCA", dim] == pytest.approx(before["FF PCA", dim], abs=2e-3)
        for method in ("FF PCA", "FF SVD"):
            assert values(turned, "map@10")[method, dim] == pytest.approx(before[method, dim], abs=2e-3)


def test_random_coordinates_are_seeded_by_the_run_and_averaged_over_draws(sets, rows):
    queries, query_labels, database, database_labels = sets
    assert retrieval_baselines(*sets, DIMS, SOURCE) == rows
    assert retrieval_baselines(*sets, DIMS, dataclasses.replace(SOURCE, seed=4)) != rows
    sums = dict.fromkeys(DIMS, 0.0)
    for draw in range(2):
        chosen = np.random.default_rng((3, draw)).permutation(32)[:16]
        own = retrieval(queries[:, chosen], query_labels, database[:, chosen], database_labels, {"": DIMS}, SOURCE)
        for (_, dim), value in values(own, "map@10").items():
            sums[dim] += value / 2
    found = values(rows, "map@10")
    assert {dim: found["FF random coordinates", dim] for dim in DIMS} == pytest.approx(sums)


def test_more_queries_than_asked_for_are_thinned_evenly(sets):
    queries, query_labels, database, database_labels = sets
    rows = retrieval_baselines(*sets, DIMS, SOURCE, draws=1, max_queries=11)
    assert {row.n for row in rows} == {11}
    ends = np.linspace(0, 109, 11).round().astype(int)
    alone = retrieval_baselines(queries[ends], query_labels[ends], database, database_labels, DIMS, SOURCE, draws=1)
    assert rows == alone


def test_the_mean_of_rows_is_worked_by_hand():
    one, other = ([SOURCE.row("retrieval", "FF", "top_1", value, 9, dim=8)] for value in (0.2, 0.8))
    assert mean_rows([one, other]) == [dataclasses.replace(one[0], value=0.5)]


def test_low_rank_is_the_best_approximation_and_at_full_rank_the_weight_itself():
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    directions, scaled = low_rank(weight)
    left, sizes, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    for rank in (1, 3, 7):
        expected = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        np.testing.assert_allclose(scaled[:, :rank] @ directions[:, :rank].T, expected, atol=1e-5)
    np.testing.assert_allclose(scaled @ directions.T, weight, atol=1e-5)


def test_classifiers_of_few_dims(sets):
    vectors, labels, train, train_labels = sets
    weight, bias = fit_linear_probe(train, train_labels, 10)
    rows = classification_baselines(train, train_labels, vectors, labels, (weight, bias), (2, 8, 16, 32), SOURCE)
    found = values(rows)
    # Ten classes allow ranks to ten.
    assert {dim for method, dim in found if method == "FF low-rank classifier"} == {2, 8}
    left, sizes, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    for rank in (2, 8):
        logits = vectors @ ((left[:, :rank] * sizes[:rank]) @ right[:rank]).T + bias.numpy()
        assert found["FF low-rank classifier", rank] == pytest.approx((logits.argmax(1) == labels).mean(), abs=0.01)
    own = ((vectors @ weight.numpy().T + bias.numpy()).argmax(1) == labels).mean()
    probes = [found["FF random coordinates, probe", dim] for dim in (2, 8, 16, 32)]
    assert probes[-1] == pytest.approx(own, abs=0.02), "all coordinates, in another order"
    assert probes[0] < probes[1] < probes[-1]
    assert {(row.study, row.n) for row in rows} == {("classification", 110)}
    first = np.random.default_rng(3).permutation(32)[:8]
    again = fit_linear_probe(train[:, first], train_labels, 10)
    logits = vectors[:, first] @ again[0].numpy().T + again[1].numpy()
    assert probes[1] == pytest.approx((logits.argmax(1) == labels).mean())


@pytest.mark.parametrize("batch_rows", [8192, 64])
def test_the_probe_is_sklearns_logistic_regression(monkeypatch, batch_rows):
    monkeypatch.setattr(linear_probe, "BATCH_ROWS", batch_rows)
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=300)
    vectors = 5 + rng.uniform(0.1, 10, 6) * (rng.standard_normal((4, 6))[labels] + rng.standard_normal((300, 6)))
    vectors = np.concatenate([vectors, np.full((300, 1), 2.0)], axis=1)  # a coordinate that never changes
    weight, bias = fit_linear_probe(vectors, labels, 4, l2=1e-2, max_iterations=200)
    scaled = (vectors - vectors.mean(0)) / np.where(vectors.std(0) == 0, 1, vectors.std(0))
    model = linear_model.LogisticRegression(C=1 / (300 * 1e-2), tol=1e-8, max_iter=1000).fit(scaled, labels)
    logits = vectors @ weight.numpy().T + bias.numpy()
    expected = model.decision_function(scaled)
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=5e-3
    )


def test_mean_and_deviation_in_blocks_are_numpys_in_float64(monkeypatch):
    monkeypatch.setattr(linear_probe, "BATCH_ROWS", 64)
    z = (1000 + np.random.default_rng(0).standard_normal((300, 5))).astype(np.float32)
    z[:, 2] = 0.1  # never changes, and is no short binary fraction
    mean, deviation = linear_probe._mean_and_deviation(torch.from_numpy(z))
    np.testing.assert_allclose(mean, z.astype(np.float64).mean(0), rtol=1e-7)
    np.testing.assert_allclose(deviation, z.astype(np.float64).std(0), rtol=1e-6, atol=1e-12)
    assert deviation[2] == 0 and mean.dtype == deviation.dtype == torch.float32


def test_blocks_are_put_together_in_order(monkeypatch, sets):
    monkeypatch.setattr(baselines, "BATCH_ROWS", 64)
    database, chosen = sets[2], np.array([5, 0, 31])
    taken = take_coordinates(database.astype(np.float16), chosen)
    np.testing.assert_array_equal(taken, database.astype(np.float16)[:, chosen])
    directions, mean = torch.eye(32)[:, [5, 0, 31]], torch.arange(32.0)
    projected = project(database, directions, mean)
    np.testing.assert_allclose(projected, (database - mean.numpy())[:, chosen], atol=1e-5)
    assert taken.dtype == projected.dtype == np.float32


def test_the_probe_names_the_row_that_is_not_finite_in_whichever_block(monkeypatch, sets):
    monkeypatch.setattr(linear_probe, "BATCH_ROWS", 64)
    broken = sets[2].copy()
    broken[130, 5] = np.inf
    with pytest.raises(UserError, match="row 130 of the training images' embeddings"):
        fit_linear_probe(broken, sets[3], 10)


def test_bad_input_is_refused(sets):
    queries, query_labels, database, database_labels = sets
    with pytest.raises(UserError, match=r"\[8, 33\] must be one or more of 1 to 32"):
        retrieval_baselines(*sets, [8, 33], SOURCE)
    broken = database.copy()
    broken[5, 5] = np.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        retrieval_baselines(queries, query_labels, broken, database_labels, [8], SOURCE)
    with pytest.raises(UserError, match="NaN or infinity"):
        fit_linear_probe(broken, database_labels, 10)
    with pytest.raises(UserError, match="from 0 to 9; the classes are 0 to 8"):
        fit_linear_probe(database, database_labels, 9)
