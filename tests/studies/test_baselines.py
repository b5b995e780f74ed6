import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from mrl import adapt
from mrl.adapt import principal_components
from mrl.results import Source
from mrl.studies import baselines
from mrl.studies.baselines import classification_baselines, fit_linear_probe, learned_baselines, retrieval_baselines
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
    return {(row.method, row.dim): row.value for row in rows if row.metric == metric and row.study != "quantization"}


def test_fault_28_every_baseline_stands_beside_plain_truncation(sets, rows):
    assert set(values(rows)) == {(method, dim) for method in METHODS for dim in DIMS}
    truncated = retrieval(*sets, {"FF truncated": DIMS}, SOURCE, ks=(10,))
    of_pca = [row for row in rows if row.method == "FF PCA" and row.study == "retrieval"]
    assert [(row.study, row.metric, row.dim, row.n, row.cost) for row in of_pca] == [
        (row.study, row.metric, row.dim, row.n, row.cost) for row in truncated
    ]


@pytest.mark.parametrize("centered", [True, False])
def test_principal_components_are_numpys_singular_directions_in_whatever_blocks(monkeypatch, sets, centered):
    monkeypatch.setattr(adapt, "BLOCK", 64)
    database = sets[2]
    center = database.mean(0) if centered else np.zeros(32, np.float32)
    right = np.linalg.svd(database - center, full_matrices=False)[2]
    np.testing.assert_allclose(np.abs((right.T * principal_components(database, center)).sum(0)), 1, atol=1e-5)


def test_pca_and_svd_search_in_those_directions_even_with_fewer_images_than_dims(sets):
    queries, query_labels, database, database_labels = sets
    few, few_labels = database[:20], database_labels[:20]
    found = values(retrieval_baselines(queries, query_labels, few, few_labels, [4, 32], SOURCE), "map@10")
    for method, mean in (("FF PCA", few.mean(0)), ("FF SVD", 0 * few[0])):
        turned = [(vectors - mean) @ principal_components(few, mean) for vectors in (queries, few)]
        slow = retrieval(turned[0], query_labels, turned[1], few_labels, {method: [4, 32]}, SOURCE, ks=(10,))
        assert {key: found[key] for key in values(slow)} == pytest.approx(values(slow, "map@10"), abs=1e-3)


def test_at_full_width_svd_and_coordinates_are_the_model_itself_and_a_projection_is_close(sets):
    found = values(retrieval_baselines(*sets, [4, 16, 32], SOURCE, num_random=5))
    [full] = values(retrieval(*sets, {"FF": [32]}, SOURCE, ks=(10,))).values()
    assert [found["FF SVD", 32], found["FF random coordinates", 32]] == pytest.approx([full, full], abs=1e-3)
    projections = [found["FF random projection", dim] for dim in (4, 16, 32)]
    assert projections == sorted(projections) and projections[-1] > full - 0.1 > 0.8, "chance is 0.1"


def test_random_choices_are_seeded_by_the_run_and_averaged(sets, rows):
    queries, query_labels, database, database_labels = sets
    assert retrieval_baselines(*sets, DIMS, SOURCE) == rows
    other = values(retrieval_baselines(*sets, DIMS, dataclasses.replace(SOURCE, seed=4)))
    assert all(other[method, 2] != values(rows)[method, 2] for method in METHODS[2:])
    sums = dict.fromkeys(DIMS, 0.0)
    for i in range(2):
        chosen = np.random.default_rng((3, i)).permutation(32)[:16]
        own = retrieval(queries[:, chosen], query_labels, database[:, chosen], database_labels, {"": DIMS}, SOURCE)
        for (_, dim), value in values(own, "map@10").items():
            sums[dim] += value / 2
    found = values(rows, "map@10")
    assert {dim: found["FF random coordinates", dim] for dim in DIMS} == pytest.approx(sums)


def test_the_projected_embeddings_are_quantized_too(rows):
    pytest.importorskip("faiss")
    coded = [row for row in rows if row.study == "quantization"]
    assert {row.method for row in coded} == {"FF PCA"}
    exact = {(row.metric, row.dim): row.value for row in coded if row.code == "float32"}
    of_pca = [row for row in rows if (row.study, row.method) == ("retrieval", "FF PCA")]
    assert exact == {(row.metric, row.dim): row.value for row in of_pca if row.metric in ("top_1", "map@10")}


def test_learned_maps_are_fit_on_the_database_with_the_seed_of_the_run(sets, monkeypatch):
    monkeypatch.setattr(adapt, "STEPS", 5)
    queries, query_labels, database, database_labels = sets
    rows = learned_baselines(*sets, DIMS, SOURCE)
    expected = {(f"FF {kind}supervised map", dim) for kind in ("", "un") for dim in DIMS}
    assert set(values(rows)) == expected | {("FF LDA", dim) for dim in (2, 4, 8)}, "ten classes: nine dims of LDA"
    maps = {
        "FF LDA": LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(database, database_labels).transform,
        "FF supervised map": adapt.fit(database, database_labels, DIMS, seed=3),
        "FF unsupervised map": adapt.fit(database, None, DIMS, seed=3),
    }
    for method, transform in maps.items():
        arrays = (transform(queries), query_labels, transform(database), database_labels)
        again = retrieval(*arrays, {method: [2, 8]}, SOURCE, ks=(10,))
        assert [row for row in rows if row.method == method and row.dim in (2, 8)] == again


@pytest.mark.parametrize(("images_per_class", "has_lda"), [(1, False), (2, False), (6, True)])
def test_lda_is_left_out_where_classes_have_too_few_images(sets, images_per_class, has_lda):
    queries, query_labels, database, _ = sets
    with nullcontext() if has_lda else pytest.warns(UserWarning, match="ff: FF LDA is left out"):
        rows = learned_baselines(queries, query_labels, database[:30], np.arange(30) // images_per_class, DIMS, SOURCE)
    methods = {"FF supervised map", "FF unsupervised map"} | ({"FF LDA"} if has_lda else set())
    assert {row.method for row in rows} == methods


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


@pytest.mark.parametrize("batch_size", [8192, 64])
def test_the_probe_is_sklearns_logistic_regression(monkeypatch, batch_size):
    monkeypatch.setattr(baselines, "BATCH_SIZE", batch_size)
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=300)
    vectors = 5 + rng.uniform(0.1, 10, 6) * (rng.standard_normal((4, 6))[labels] + rng.standard_normal((300, 6)))
    constant = np.full((300, 1), 0.1)  # no short binary fraction: its deviation must still be exactly 0
    vectors = np.concatenate([vectors, constant, 1000 + rng.standard_normal((300, 1))], axis=1)
    weight, bias = fit_linear_probe(vectors, labels, 4, l2=1e-2, max_iterations=200)
    scaled = (vectors - vectors.mean(0)) / np.where(vectors.std(0) < 1e-9, 1, vectors.std(0))
    model = linear_model.LogisticRegression(C=1 / (300 * 1e-2), tol=1e-8, max_iter=1000).fit(scaled, labels)
    logits = vectors @ weight.double().numpy().T + bias.double().numpy()
    expected = model.decision_function(scaled)
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=5e-3
    )
