import statistics

import numpy as np
import pytest

from mrl.errors import UserError
from mrl.results import Source
from mrl.studies.transfer import few_shot, support_draws

SOURCE = Source("digits", "some_run", 3, 32, 28, False)


def values(rows):
    return {(row.metric, row.dim): row.value for row in rows}


def case(num_images=60, num_classes=4):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(num_images) % num_classes)
    centers = rng.standard_normal((num_classes, 8))
    return (centers[labels] + rng.standard_normal((num_images, 8))).astype(np.float32), labels


def test_draws_have_the_same_number_of_each_class_and_leave_the_others():
    labels = np.repeat([5, 70_000, 9], [4, 6, 10])
    index = np.unique(labels, return_inverse=True)[1]
    draws = list(support_draws(index, 3, 8))
    for supports, queries in draws:
        assert np.bincount(index[supports]).tolist() == [3, 3, 3]
        assert index[supports].tolist() == sorted(index[supports])
        assert sorted([*supports, *queries]) == list(range(20))
    assert len({tuple(supports) for supports, _ in draws}) > 1


def test_fewer_shots_are_among_the_more():
    index = np.arange(40) % 4
    for (few, _), (many, _) in zip(support_draws(index, 1, 5), support_draws(index, 3, 5), strict=True):
        assert set(few) < set(many)


def test_equals_a_loop_over_queries():
    vectors, labels = case()
    rows = few_shot(vectors, labels + 10, [2, 4, 8], SOURCE, "MRL", shots=[1, 3], num_draws=4)
    for dim in (2, 4, 8):
        for shots in (1, 3):
            accuracies = []
            for supports, queries in support_draws(labels, shots, 4):
                units = [v[:dim].astype(np.float64) / np.linalg.norm(v[:dim]) for v in vectors]
                means = [np.mean([units[i] for i in supports if labels[i] == c], axis=0) for c in range(4)]
                right = 0
                for i in queries:
                    cosines = [units[i] @ mean / np.linalg.norm(mean) for mean in means]
                    right += np.argmax(cosines) == labels[i]
                accuracies.append(right / len(queries))
            assert values(rows)[f"top_1_{shots}_shot", dim] == pytest.approx(statistics.mean(accuracies))
            assert values(rows)[f"top_1_{shots}_shot_std", dim] == pytest.approx(statistics.stdev(accuracies))
    assert {(row.metric, row.n) for row in rows if row.dim == 2 and "std" not in row.metric} == {
        ("top_1_1_shot", 56),
        ("top_1_3_shot", 48),
    }


def test_fault_19_neither_length_nor_coordinates_past_the_size_change_anything():
    vectors, labels = case()
    changed = vectors * np.random.default_rng(1).uniform(0.5, 2, (60, 1)).astype(np.float32)
    changed[:, 4:] *= np.random.default_rng(2).uniform(0, 9, (60, 1)).astype(np.float32)
    expected = values(few_shot(vectors, labels, [4], SOURCE, "MRL", shots=[1, 3, 5], num_draws=9))
    found = values(few_shot(changed, labels, [4], SOURCE, "MRL", shots=[1, 3, 5], num_draws=9))
    assert found == pytest.approx(expected)


def test_separable_classes_need_one_shot_and_labels_are_only_names():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    rows = few_shot(vectors, np.repeat([2048, 65_536, 65_537], 10), [3], SOURCE, "MRL", shots=[1, 9], num_draws=2)
    assert values(rows) == {
        ("top_1_1_shot", 3): 1,
        ("top_1_1_shot_std", 3): 0,
        ("top_1_9_shot", 3): 1,
        ("top_1_9_shot_std", 3): 0,
    }


def test_refuses_what_leaves_nothing_to_classify():
    vectors, labels = case()
    with pytest.raises(UserError, match=r"class 0 has 15 images.*15 supports.*up to 14"):
        few_shot(vectors, labels, [8], SOURCE, "MRL", shots=[1, 15])
    with pytest.raises(UserError, match="two or more classes"):
        few_shot(vectors, labels * 0, [8], SOURCE, "MRL")
    with pytest.raises(UserError, match="59 labels"):
        few_shot(vectors, labels[1:], [8], SOURCE, "MRL")
    vectors[33] = np.inf
    with pytest.raises(UserError, match="row 33"):
        few_shot(vectors, labels, [8], SOURCE, "MRL", shots=[1])
