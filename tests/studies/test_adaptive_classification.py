"""Thresholds and routing, the cascade over splits, the oracle, and the cascade in use."""

import statistics
from collections import Counter

import numpy as np
import pytest
import torch

import mrl
from mrl.errors import UserError
from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.studies.adaptive_classification import (
    THRESHOLD_GRID,
    CascadePoint,
    cascade,
    cascade_points,
    describe_cascade,
    dims_saved,
    fit_thresholds,
    fixed_feature,
    headlines,
    majority_vote,
    oracle,
    route,
    run_cascade,
    splits,
)
from mrl.studies.classification import predict

SOURCE = Source("digits", "some_run", 3, 32, 28, True)
DIMS = (8, 16, 32, 64)


def images(num_images=300, num_sizes=4, seed=0):
    """Confidences that are related to correctness, some of them exactly on the grid, and correctness."""
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
def test_thresholds_and_routes_equal_loops_over_images(seed):
    confidence, correct = images(seed=seed)
    thresholds = mrl.fit_thresholds(confidence, correct)
    assert thresholds.tolist() == one_pair_at_a_time(confidence, correct)
    assert mrl.route(confidence, thresholds).tolist() == one_image_at_a_time(confidence, thresholds)


def test_thresholds_worked_by_hand():
    confidence = np.array([[0.95, 0.55, 0.30], [0.99, 0.99, 0.99]])
    # The small size is right where its confidence is 0.55 or more; the large one is wrong only on the first image.
    correct = np.array([[True, True, False], [False, True, True]])
    # Best: image 0 stays, image 2 goes on; image 1 may do either, so the smallest threshold is the first grid value
    # that is not below 0.30.
    [threshold] = fit_thresholds(confidence, correct)
    assert threshold == THRESHOLD_GRID[22] == pytest.approx(0.3)
    assert route(confidence, [threshold]).tolist() == [0, 0, 1]
    assert route(confidence, [0.9]).tolist() == [0, 1, 1]
    assert fit_thresholds(np.full((2, 10), 0.7), np.ones((2, 10), dtype=bool)).tolist() == [0.1], "smallest of a tie"


def test_threshold_0_stops_at_the_first_size_1_at_the_last_and_a_confidence_on_it_goes_on():
    confidence, _ = images()
    confidence[:, :2] = [[1.0, 1e-9]] * 4
    assert set(route(confidence, np.zeros(3))) == {0}
    assert set(route(confidence, np.ones(3))) == {3}
    assert set(route(confidence, [1, 0, 0.5])) == {1}
    assert route(np.array([[0.5, 0.5000001], [0.9, 0.9]]), [0.5]).tolist() == [1, 0]


def test_pairs_are_fitted_independently_and_the_order_of_images_changes_nothing():
    confidence, correct = images()
    whole = fit_thresholds(confidence, correct)
    for g in range(3):
        assert fit_thresholds(confidence[g : g + 2], correct[g : g + 2]).tolist() == [whole[g]]
    order = np.random.default_rng(1).permutation(confidence.shape[1])
    assert fit_thresholds(confidence[:, order], correct[:, order]).tolist() == whole.tolist()
    assert route(confidence[:, order], whole).tolist() == route(confidence, whole)[order].tolist()


def test_thresholds_and_routes_refuse_arrays_that_cannot_be():
    confidence, correct = images()
    with pytest.raises(UserError, match=r"\(4, 300\).*\(3, 300\)"):
        fit_thresholds(confidence, correct[:3])
    with pytest.raises(UserError, match="above 0 and at most 1"):
        fit_thresholds(confidence + 1, correct)
    with pytest.raises(UserError, match="above 0 and at most 1"):
        route(confidence * np.nan, np.ones(3))
    with pytest.raises(UserError, match=r"4 sizes need 3 thresholds.*\(4,\)"):
        route(confidence, np.ones(4))


def values(rows, method="MRL cascade"):
    return {(row.metric, row.dim): (row.value, row.expected_dim) for row in rows if row.method == method}


def test_splits_are_disjoint_complete_and_of_the_papers_size():
    for num_images, num_fit in ((50_000, 10_000), (60_000, 10_000), (10_000, 2_000), (7, 1)):
        found = list(splits(num_images, 2))
        for fit, test in found:
            assert len(fit) == num_fit
            assert sorted([*fit, *test]) == list(range(num_images))
        if num_images > 7:
            assert not np.array_equal(found[0][0], found[1][0])
    assert len(list(splits(10))) == 30
    with pytest.raises(UserError, match="there are 4"):
        next(splits(4))


def test_the_cascade_equals_a_loop_over_splits_caps_and_images():
    dims, (confidence, correct) = DIMS[:3], images(200, num_sizes=3)
    accuracies, used, tried = {16: [], 32: []}, {16: [], 32: []}, {16: [], 32: []}
    for split in range(4):
        order = np.random.default_rng(split).permutation(200)
        thresholds = fit_thresholds(confidence[:, order[:40]], correct[:, order[:40]])
        for last, cap in ((1, 16), (2, 32)):
            chosen = one_image_at_a_time(confidence[: last + 1, order[40:]], thresholds[:last])
            accuracies[cap].append(np.mean([correct[g, image] for g, image in zip(chosen, order[40:], strict=True)]))
            used[cap].append(np.mean([dims[g] for g in chosen]))
            tried[cap].append(np.mean([sum(dims[: g + 1]) for g in chosen]))
    rows = cascade(confidence, correct, dims, SOURCE, "MRL", num_splits=4)
    found, mean, std = values(rows), statistics.mean, statistics.stdev
    for cap in (16, 32):
        assert found["top_1", cap] == pytest.approx((mean(accuracies[cap]), mean(used[cap])))
        assert found["top_1_std", cap] == pytest.approx((std(accuracies[cap]), std(used[cap])))
        assert found["top_1_cumulative", cap] == pytest.approx((mean(accuracies[cap]), mean(tried[cap])))
    assert {row.method for row in rows} == {"MRL cascade"}
    assert {(row.study, row.n, row.flip, row.run) for row in rows} == {("cascade", 160, True, "some_run")}
    assert {row.dim for row in rows if row.metric == "threshold"} == {8, 16}
    assert {row.dim for row in rows if row.metric == "top_1"} == {16, 32}


def test_the_fixed_feature_model_is_scored_on_the_images_of_the_cascade():
    _, correct = images(200, num_sizes=3)
    # A cascade that is never sure always ends at its cap, as the fixed-feature model of that size does.
    rows = cascade(np.full((3, 200), 0.01), correct, DIMS[:3], SOURCE, "MRL", num_splits=5)
    for g, dim in ((1, 16), (2, 32)):
        fixed = values(fixed_feature(correct[g], dim, SOURCE, num_splits=5), "FF")
        assert fixed["top_1", dim] == pytest.approx(values(rows)["top_1", dim])
        assert fixed["top_1_std", dim] == pytest.approx(values(rows)["top_1_std", dim])


def points(method, of_dims):
    return [
        SOURCE.row("cascade", method, "top_1", value, 40, dim=dim, expected_dim=expected)
        for dim, (value, expected) in of_dims.items()
    ]


def test_dims_saved_worked_by_hand():
    rows = points("MRL cascade", {16: (0.70, 10), 32: (0.80, 16), 64: (0.81, 30)})
    rows += points("FF", {8: (0.65, 8), 32: (0.70, 32), 64: (0.805, 64), 128: (0.82, 128)})
    assert dims_saved(rows, "MRL cascade") == {8: 0.8, 32: 3.2, 64: 64 / 30, 128: None}
    assert dims_saved(rows, "MRL cascade", tolerance=0.006) == {8: 0.8, 32: 3.2, 64: 4.0, 128: None}
    assert dims_saved(rows, "MRL cascade", tolerance=0.011)[128] == 128 / 30
    two_runs = points("MRL cascade", {16: (0.6, 9)}) + points("MRL cascade", {16: (0.8, 11)})
    assert dims_saved(two_runs + points("FF", {40: (0.7, 40)}), "MRL cascade") == {40: 4.0}


def test_the_headline_is_the_largest_saving_and_there_is_none_without_one():
    rows = points("MRL cascade", {16: (0.70, 10), 32: (0.80, 16)}) + points("FF", {32: (0.70, 32), 64: (0.79, 64)})
    assert headlines(rows) == ["MRL cascade (digits): the accuracy of FF-64 from 16.0 dims on average, 4.0 times fewer"]
    assert headlines(points("MRL cascade", {16: (0.7, 10)}) + points("FF", {8: (0.7, 8), 32: (0.9, 32)})) == []
    assert headlines(points("MRL cascade", {16: (0.7, 10)})) == []


def of_oracle(predictions, labels, dims=DIMS):
    rows = oracle(predictions, labels, dims, SOURCE, "MRL")
    return {(row.metric, row.dim): row.value for row in rows}, rows


def test_the_oracle_worked_by_hand():
    # Image 0: right from the second size on. 1: right at the last only. 2: never. 3: right, wrong, wrong.
    predictions, labels = np.array([[5, 7, 1, 3], [0, 2, 1, 4], [0, 1, 4, 5]]), np.arange(4)
    found, rows = of_oracle(predictions, labels, [8, 16, 32])
    assert [found["first_correct", dim] for dim in (8, 16, 32)] == [0.25, 0.25, 0.25]
    assert (found["never_correct", None], found["top_1", None]) == (0.25, 0.75)
    # Votes: 0 (two of three); 1 (a tie of three, the largest size); 1 for image 2, wrong; 5 for image 3, wrong.
    assert found["majority_vote_top_1", None] == 0.5
    agreement = {key: value for key, value in found.items() if key[0].startswith("agreement")}
    assert agreement == {("agreement_with_16", 8): 0.25, ("agreement_with_32", 8): 0, ("agreement_with_32", 16): 0.25}
    [row] = [row for row in rows if row.metric == "top_1"]
    assert row.expected_dim == (16 + 32 + 32 + 8) / 4


def test_the_oracle_equals_a_loop_over_images_and_is_never_below_a_prefix():
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(4, size=(4, 200)) + 70_000, rng.integers(4, size=200) + 70_000
    found, _ = of_oracle(predictions, labels)
    first, voted = Counter(), 0
    for of_image, label in zip(predictions.T.tolist(), labels, strict=True):
        first[next((dim for dim, c in zip(DIMS, of_image, strict=True) if c == label), None)] += 1
        votes = Counter(of_image)
        voted += max(reversed(of_image), key=lambda c: votes[c]) == label
    assert [found["first_correct", dim] for dim in DIMS] == [first[dim] / 200 for dim in DIMS]
    assert found["never_correct", None] == first[None] / 200
    assert found["majority_vote_top_1", None] == voted / 200
    assert found["top_1", None] == pytest.approx(1 - found["never_correct", None])
    assert found["top_1", None] >= (predictions == labels).mean(axis=1).max()


def test_a_tie_of_votes_goes_to_the_largest_size_among_the_most_voted():
    assert majority_vote(np.array([[3], [3], [1], [1], [9]])).tolist() == [1]
    assert majority_vote(np.array([[1], [3], [3], [1], [9]])).tolist() == [1]


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    head = NestedLinear([2, 4, 8], 5)
    vectors, labels = rng.normal(size=(200, 8)).astype(np.float32) * 3, rng.integers(0, 5, 200)
    return vectors, labels, [head.weight_and_bias(g) for g in range(3)]


def test_a_cascade_that_reads_only_what_it_needs_decides_as_route_does_on_everything(case):
    vectors, _, classifiers = case
    thresholds = np.array([0.6, 0.5])
    with torch.inference_mode():
        classes, chosen = run_cascade(torch.from_numpy(vectors), classifiers, thresholds)
    everything = predict(vectors, classifiers)
    expected = route(everything.confidence, thresholds)
    assert set(expected) == {0, 1, 2}
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_array_equal(classes, everything.classes[expected, np.arange(200)])


def test_points_are_of_images_that_no_threshold_was_fitted_on(case):
    vectors, labels, classifiers = case
    cascades, alone = cascade_points(vectors, labels, classifiers)
    fit, test = next(splits(200, 1))
    predicted = predict(vectors, classifiers)
    correct = predicted.classes == labels
    thresholds = fit_thresholds(predicted.confidence[:, fit], correct[:, fit])
    accuracy, dim = accuracy_and_dim(predicted.confidence[:, test], correct[:, test], [2, 4, 8], thresholds)
    last = cascades[-1]
    assert [point.cap for point in cascades] == [4, 8] and [point.cap for point in alone] == [2, 4, 8]
    assert (last.top_1, last.expected_dim) == pytest.approx((accuracy, dim))
    assert last.bytes_per_image == 4 * last.expected_dim
    for point, of_size in zip(alone, correct[:, test], strict=True):
        assert point.top_1 == pytest.approx(of_size.mean()) and point.bytes_per_image == 4 * point.cap
    assert all(0 < point.us_per_image < 1e6 for point in cascades + alone)


def test_what_a_cascade_saves_is_said_from_the_numbers():
    cascades = [CascadePoint(16, 0.7, 9.0, 36.0, 1.0), CascadePoint(64, 0.8, 20.0, 80.0, 1.0)]
    alone = [CascadePoint(dim, top_1, dim, 4 * dim, 1.0) for dim, top_1 in ((8, 0.6), (16, 0.8), (64, 0.85))]
    assert describe_cascade(cascades, alone) == (
        "Up to 64 dims, the cascade reads 20.0 dims on average and is right for 80.0% of the images; full width is "
        "right for 85.0%. The smallest single size that is as accurate as the cascade, or as full width, has 16 dims "
        "(80.0%)."
    )
