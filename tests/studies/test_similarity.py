import itertools

import numpy as np
import pytest

from mrl.errors import UserError
from mrl.results import Source
from mrl.studies.geometry import positive_pairs, similarity

SOURCE = Source("digits", "some_run", 3, 32, 28, False)


def values(rows):
    return {(row.metric, row.dim): row.value for row in rows}


def mean_cosine(vectors, pairs, dim):
    sums = 0.0
    for i, j in pairs:
        a, b = vectors[i, :dim], vectors[j, :dim]
        sums += a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return sums / len(pairs)


def test_approaches_the_mean_over_all_pairs():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 6)
    vectors = rng.standard_normal((5, 16))[labels] + rng.standard_normal((30, 16))
    everything = list(itertools.permutations(range(30), 2))
    positive = [(i, j) for i, j in everything if labels[i] == labels[j]]
    found = values(similarity(vectors, labels, [4, 16], SOURCE, "MRL", num_pairs=100_000))
    for dim in (4, 16):
        # The standard error of 100,000 draws of a value within -1 to 1 is below 0.0032.
        assert found["cosine_positive", dim] == pytest.approx(mean_cosine(vectors, positive, dim), abs=0.01)
        assert found["cosine_random", dim] == pytest.approx(mean_cosine(vectors, everything, dim), abs=0.01)


def test_worked_by_hand():
    # One dim: signs. Two images of a class on one side, the other class's two on the other.
    vectors = np.array([[1.0, 1.0], [2.0, -2.0], [-3.0, 0.0], [-1.0, 0.0]])
    found = values(similarity(vectors, np.array([4, 4, 9, 9]), [1, 2], SOURCE, "MRL", num_pairs=5000))
    assert found["cosine_positive", 1] == 1
    # Of 6 pairs 2 are on one side: (2 - 4) / 6.
    assert found["cosine_random", 1] == pytest.approx(-1 / 3, abs=0.05)
    # The pair of class 4 is at a right angle, that of class 9 parallel, and both come equally often.
    assert found["cosine_positive", 2] == pytest.approx(0.5, abs=0.05)


def test_positive_pairs_are_two_images_of_one_class_each_other_equally_often():
    labels = np.array([3, 70_000, 3, 1, 70_000, 3, 2])
    pairs = positive_pairs(labels, 40_000, np.random.default_rng(0))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert (labels[pairs[:, 0]] == labels[pairs[:, 1]]).all()
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    frequency = {tuple(kind): count / len(pairs) for kind, count in zip(kinds.tolist(), counts, strict=True)}
    # Five images share a class; those of class 3 have two partners, those of class 70,000 one.
    of_three = dict.fromkeys(itertools.permutations((0, 2, 5), 2), 1 / 10)
    assert frequency == pytest.approx(of_three | {(1, 4): 1 / 5, (4, 1): 1 / 5}, abs=0.02)


def test_scale_of_a_vector_and_order_of_the_classes_names_change_nothing():
    rng = np.random.default_rng(0)
    vectors, labels = rng.standard_normal((40, 8)), rng.integers(4, size=40)
    before = values(similarity(vectors, labels, [4, 8], SOURCE, "MRL"))
    scaled = vectors * rng.uniform(0.1, 10, (40, 1))
    assert values(similarity(scaled, labels + 65_536, [4, 8], SOURCE, "MRL")) == pytest.approx(before, abs=1e-5)


def test_identical_images_are_at_exactly_1_and_classes_of_one_image_have_no_positive_pairs():
    vectors = np.tile(np.random.default_rng(0).standard_normal(24), (9, 1))
    rows = similarity(vectors, np.arange(9), [8, 24], SOURCE, "FF", num_pairs=50)
    assert {(row.metric, row.dim, row.n) for row in rows} == {("cosine_random", 8, 50), ("cosine_random", 24, 50)}
    assert all(row.value == pytest.approx(1) for row in rows)


def test_bad_input_is_refused():
    vectors = np.ones((6, 8))
    with pytest.raises(UserError, match="two images"):
        similarity(vectors[:1], np.zeros(1, int), [8], SOURCE, "FF")
    with pytest.raises(UserError, match="9 dims"):
        similarity(vectors, np.zeros(6, int), [9], SOURCE, "FF")
    vectors[4, 2] = np.inf
    with pytest.raises(UserError, match="row 4"):
        similarity(vectors, np.zeros(6, int), [8], SOURCE, "FF")
