"""Thresholds and routing, the cascade over splits, the oracle, and the cascade in use."""

import statistics

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
        right = []
        for t in np.linspace(0.1, 1, 100):
            images = zip(confidence[g], correct[g], correct[g + 1], strict=True)
            right.append(sum(bool(small) if float(c) > t else bool(large) for c, small, large in images))
        thresholds.append(np.linspace(0.1, 1, 100)[right.index(max(right))])
    return thresholds


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_and_routes_equal_loops_over_images(seed):
    confidence, correct = images(seed=seed)
    thresholds = mrl.fit_thresholds(confidence, correct)
    assert thresholds.tolist() == one_pair_at_a_time(confidence, correct)
    assert mrl.route(confidence, thresholds).tolist() == one_image_at_a_time(confidence, thresholds)


def test_thresholds_and_routes_refuse_arrays_that_cannot_be():
    confidence, correct = images()
    with pytest.raises(UserError, match=r"\(4, 300\).*\(3, 300\)"):
        fit_thresholds(confidence, correct[:3])
    for wrong in (confidence + 1, confidence * np.nan):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            route(wrong, np.ones(3))
    with pytest.raises(UserError, match=r"4 sizes need 3 thresholds.*\(4,\)"):
        route(confidence, np.ones(4))


def values(rows, method="MRL cascade"):
    return {(row.metric, row.dim): (row.value, row.expected_dim) for row in rows if row.method == method}


def test_splits_are_disjoint_complete_and_of_the_papers_size():
    for num_images, num_fit in ((50_000, 10_000), (60_000, 10_000), (10_000, 2_000), (7, 1), (2, 1)):
        found = list(splits(num_images, 2))
        for fit, test in found:
            assert len(fit) == num_fit
            assert sorted([*fit, *test]) == list(range(num_images))
        if num_images > 7:
            assert not np.array_equal(found[0][0], found[1][0])
    assert len(list(splits(10))) == 30
    with pytest.raises(UserError, match="there are 1"):
        next(splits(1))


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


def test_dims_saved_and_its_headline_worked_by_hand():
    rows = points("MRL cascade", {16: (0.70, 10), 32: (0.80, 16), 64: (0.81, 30)})
    rows += points("FF", {8: (0.65, 8), 32: (0.70, 32), 64: (0.805, 64), 128: (0.82, 128)})
    assert dims_saved(rows, "MRL cascade") == {8: 0.8, 32: 3.2, 64: 64 / 30, 128: None}
    assert headlines(rows) == ["MRL cascade (digits): the accuracy of FF-32 from 10.0 dims on average, 3.2 times fewer"]
    two_runs = points("MRL cascade", {16: (0.6, 9)}) + points("MRL cascade", {16: (0.8, 11)})
    assert dims_saved(two_runs + points("FF", {40: (0.7, 40)}), "MRL cascade") == {40: 4.0}
    for no_saving in ({}, {8: (0.7, 8), 32: (0.9, 32)}):
        assert headlines(points("MRL cascade", {16: (0.7, 10)}) + points("FF", no_saving)) == []


def test_the_oracle_worked_by_hand():
    # Image 0: right from the second size on. 1: right at the last only. 2: never. 3: right, wrong, wrong.
    predictions, labels = np.array([[5, 7, 1, 3], [0, 2, 1, 4], [0, 1, 4, 5]]), np.arange(4)
    # Votes: 0 (two of three); 1 (a tie of three, the largest size); 1 for image 2, wrong; 5 for image 3, wrong.
    shares = {"never_correct": 0.25, "top_1": 0.75, "majority_vote_top_1": 0.5}
    expected = {("first_correct", dim): 0.25 for dim in (8, 16, 32)} | {(name, None): v for name, v in shares.items()}
    expected |= {("agreement_with_16", 8): 0.25, ("agreement_with_32", 8): 0, ("agreement_with_32", 16): 0.25}
    rows = oracle(predictions, labels, [8, 16, 32], SOURCE, "MRL")
    assert {(row.metric, row.dim): row.value for row in rows} == expected
    assert [row.expected_dim for row in rows if row.metric == "top_1"] == [(16 + 32 + 32 + 8) / 4]


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    head = NestedLinear([2, 4, 8], 5)
    vectors, labels = rng.normal(size=(200, 8)).astype(np.float32) * 3, rng.integers(0, 5, 200)
    return vectors, labels, head.weights_and_biases()


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
    chosen, last = route(predicted.confidence[:, test], thresholds), cascades[-1]
    assert [point.cap for point in cascades] == [4, 8] and [point.cap for point in alone] == [2, 4, 8]
    assert last.top_1 == pytest.approx(correct[chosen, test].mean())
    assert last.bytes_per_image == 4 * last.expected_dim == pytest.approx(4 * np.array([2, 4, 8])[chosen].mean())
    for point, of_size in zip(alone, correct[:, test], strict=True):
        assert point.top_1 == pytest.approx(of_size.mean()) and point.bytes_per_image == 4 * point.cap
    assert all(0 < point.us_per_image < 1e6 for point in cascades + alone)


def test_what_a_cascade_saves_is_said_from_the_numbers():
    cascades = [CascadePoint(16, 0.7, 9.0, 36.0, 1.0), CascadePoint(64, 0.8, 20.0, 80.0, 1.0)]
    alone = [CascadePoint(dim, top_1, dim, 4 * dim, 1.0) for dim, top_1 in ((8, 0.6), (16, 0.8), (64, 0.85))]
    said = describe_cascade(cascades, alone)
    for part in ("Up to 64 dims", "20.0 dims on average", "80.0% of the images", "for 85.0%", "has 16 dims (80.0%)"):
        assert part in said
