import itertools

import numpy as np
import pytest

import mrl
from mrl.errors import UserError
from mrl.studies.adaptive_classification import THRESHOLD_GRID, fit_thresholds, fit_thresholds_jointly, route

DIMS = (8, 16, 32, 64)


def images(num_images=300, num_sizes=4, seed=0):
    """Confidences that say something about correctness, some of them exactly on the grid, and correctness."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 1, (num_sizes, num_images)).astype(np.float32)
    confidence[:, ::7] = THRESHOLD_GRID[rng.integers(100, size=confidence[:, ::7].shape)]
    correct = rng.random(confidence.shape) < 0.4 * confidence + np.linspace(0.2, 0.5, num_sizes)[:, None]
    return confidence, correct


def one_image_at_a_time(confidence, thresholds):
    chosen = []
    for image in range(confidence.shape[1]):
        g = 0
        while g < len(thresholds) and not float(confidence[g, image]) > thresholds[g]:
            g += 1
        chosen.append(g)
    return chosen


def one_pair_at_a_time(confidence, correct):
    thresholds = []
    for g in range(len(confidence) - 1):
        best, best_right = None, -1
        for t in np.linspace(0.1, 1, 100):
            right = 0
            for c, small, large in zip(confidence[g], correct[g], correct[g + 1], strict=True):
                right += bool(small) if float(c) > t else bool(large)
            if right > best_right:
                best, best_right = t, right
        thresholds.append(best)
    return thresholds


def accuracy_and_dim(confidence, correct, dims, thresholds):
    chosen = route(confidence, thresholds)
    return correct[chosen, np.arange(len(chosen))].mean(), np.array(dims)[chosen].mean()


@pytest.mark.parametrize("seed", range(5))
def test_equals_loops_over_images(seed):
    confidence, correct = images(seed=seed)
    thresholds = fit_thresholds(confidence, correct)
    assert thresholds.tolist() == one_pair_at_a_time(confidence, correct)
    assert route(confidence, thresholds).tolist() == one_image_at_a_time(confidence, thresholds)


def test_worked_by_hand():
    confidence = np.array([[0.95, 0.55, 0.30], [0.99, 0.99, 0.99]])
    # The small size is right where its confidence is 0.55 or more; the large one is wrong only on the first image.
    correct = np.array([[True, True, False], [False, True, True]])
    # Best: image 0 stays, image 2 goes on; image 1 may do either, so the smallest threshold is the first grid value
    # that is not below 0.30.
    [threshold] = fit_thresholds(confidence, correct)
    assert threshold == THRESHOLD_GRID[22] == pytest.approx(0.3)
    assert route(confidence, [threshold]).tolist() == [0, 0, 1]
    assert route(confidence, [0.9]).tolist() == [0, 1, 1]


def test_threshold_0_stops_at_the_first_size_and_1_at_the_last():
    confidence, _ = images()
    confidence[:, :2] = [[1.0, 1e-9]] * 4
    assert set(route(confidence, np.zeros(3))) == {0}
    assert set(route(confidence, np.ones(3))) == {3}
    assert set(route(confidence, [1, 0, 0.5])) == {1}


def test_a_confidence_on_the_threshold_goes_on():
    assert route(np.array([[0.5, 0.5000001], [0.9, 0.9]]), [0.5]).tolist() == [1, 0]


def test_ties_take_the_smallest_threshold():
    confidence, correct = np.full((2, 10), 0.7), np.ones((2, 10), dtype=bool)
    assert fit_thresholds(confidence, correct).tolist() == [0.1]


def test_pairs_are_fitted_independently():
    confidence, correct = images()
    whole = fit_thresholds(confidence, correct)
    for g in range(3):
        assert fit_thresholds(confidence[g : g + 2], correct[g : g + 2]).tolist() == [whole[g]]


def test_order_of_images_changes_nothing():
    confidence, correct = images()
    order = np.random.default_rng(1).permutation(confidence.shape[1])
    thresholds = fit_thresholds(confidence, correct)
    assert fit_thresholds(confidence[:, order], correct[:, order]).tolist() == thresholds.tolist()
    assert route(confidence[:, order], thresholds).tolist() == route(confidence, thresholds)[order].tolist()


def test_joint_thresholds_keep_the_target_and_lose_to_no_cap_of_the_papers():
    for seed in range(5):
        confidence, correct = images(seed=seed)
        greedy = fit_thresholds(confidence, correct)
        capped = [np.where(np.arange(3) < cap, greedy, 0) for cap in range(4)]
        points = [accuracy_and_dim(confidence, correct, DIMS, thresholds) for thresholds in capped]
        joint = fit_thresholds_jointly(confidence, correct, DIMS, [dim for _, dim in points])
        for (accuracy, dim), thresholds in zip(points, joint, strict=True):
            found_accuracy, found_dim = accuracy_and_dim(confidence, correct, DIMS, thresholds)
            assert found_dim <= dim + 1e-9
            assert found_accuracy >= accuracy


def test_joint_thresholds_come_close_to_the_best_of_all_on_a_coarse_grid():
    confidence, correct = images(num_images=200, num_sizes=3)
    dims, target = DIMS[:3], 16.0
    grid = np.concatenate([[0.0], THRESHOLD_GRID[::3]])
    best = 0.0
    for thresholds in itertools.product(grid, repeat=2):
        accuracy, dim = accuracy_and_dim(confidence, correct, dims, np.array(thresholds))
        best = max(best, accuracy if dim <= target else 0.0)
    [joint] = fit_thresholds_jointly(confidence, correct, dims, [target])
    accuracy, _ = accuracy_and_dim(confidence, correct, dims, joint)
    assert accuracy >= best - 0.02


def test_more_dims_never_fit_worse():
    confidence, correct = images()
    joint = fit_thresholds_jointly(confidence, correct, DIMS, [8, 12, 20, 40, 64])
    accuracies = [accuracy_and_dim(confidence, correct, DIMS, thresholds)[0] for thresholds in joint]
    assert accuracies == sorted(accuracies)
    assert accuracies[0] == correct[0].mean()
    assert accuracies[-1] >= correct[3].mean()


def test_refuses_shapes_and_confidences_that_cannot_be():
    confidence, correct = images()
    with pytest.raises(UserError, match=r"\(4, 300\).*\(3, 300\)"):
        fit_thresholds(confidence, correct[:3])
    with pytest.raises(UserError, match="above 0 and at most 1"):
        fit_thresholds(confidence + 1, correct)
    with pytest.raises(UserError, match="above 0 and at most 1"):
        route(confidence * np.nan, np.ones(3))
    with pytest.raises(UserError, match=r"4 sizes has 3 thresholds.*\(4,\)"):
        route(confidence, np.ones(4))
    with pytest.raises(UserError, match="8 dims or more"):
        fit_thresholds_jointly(confidence, correct, DIMS, [4])


def test_both_stand_at_the_front_door():
    assert (mrl.fit_thresholds, mrl.route) == (fit_thresholds, route)
