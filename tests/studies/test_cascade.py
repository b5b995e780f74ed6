import statistics

import numpy as np
import pytest

from mrl.errors import UserError
from mrl.results import Source
from mrl.studies.adaptive_classification import cascade, dims_saved, draws, fit_thresholds, fixed_feature, headlines

SOURCE = Source("digits", "some_run", 3, 32, 28, True)
DIMS = (8, 16, 32)


def images(num_images=200):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, (3, num_images))
    return confidence, rng.random((3, num_images)) < 0.4 * confidence + np.array([[0.2], [0.4], [0.5]])


def values(rows, method="MRL cascade"):
    return {(row.metric, row.dim): (row.value, row.expected_dim) for row in rows if row.method == method}


def test_draws_are_disjoint_complete_and_of_the_size_the_protocol_says():
    for num_images, num_fit in ((50_000, 10_000), (60_000, 10_000), (10_000, 2_000), (7, 1)):
        splits = list(draws(num_images, 2))
        for fit, test in splits:
            assert len(fit) == num_fit
            assert sorted([*fit, *test]) == list(range(num_images))
        if num_images > 7:
            assert not np.array_equal(splits[0][0], splits[1][0])
    assert len(list(draws(10))) == 30


def test_equals_a_loop_over_draws_caps_and_images():
    confidence, correct = images()
    accuracies, used, tried = {16: [], 32: []}, {16: [], 32: []}, {16: [], 32: []}
    for draw in range(4):
        order = np.random.default_rng(draw).permutation(200)
        thresholds = fit_thresholds(confidence[:, order[:40]], correct[:, order[:40]])
        for last, cap in ((1, 16), (2, 32)):
            outcomes = []
            for image in order[40:]:
                g = 0
                while g < last and confidence[g, image] <= thresholds[g]:
                    g += 1
                outcomes.append((correct[g, image], DIMS[g], sum(DIMS[: g + 1])))
            right, final, total = np.array(outcomes).mean(axis=0)
            accuracies[cap].append(right)
            used[cap].append(final)
            tried[cap].append(total)
    found = values(cascade(confidence, correct, DIMS, SOURCE, "MRL", num_draws=4))
    for cap in (16, 32):
        assert found["top_1", cap] == pytest.approx((statistics.mean(accuracies[cap]), statistics.mean(used[cap])))
        spreads = (statistics.stdev(accuracies[cap]), statistics.stdev(used[cap]))
        assert found["top_1_std", cap] == pytest.approx(spreads)
        assert found["top_1_cumulative", cap] == pytest.approx(
            (statistics.mean(accuracies[cap]), statistics.mean(tried[cap]))
        )


def test_rows_say_what_they_are_of():
    rows = cascade(*images(), DIMS, SOURCE, "MRL-E", num_draws=2)
    assert {row.method for row in rows} == {"MRL-E cascade", "MRL-E cascade, joint"}
    assert {(row.study, row.n, row.flip, row.run) for row in rows} == {("cascade", 160, True, "some_run")}
    assert {row.dim for row in rows if row.metric == "threshold"} == {8, 16}
    assert {row.dim for row in rows if row.metric == "top_1"} == {16, 32}


def test_joint_thresholds_spend_on_new_images_about_what_they_were_given():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, (3, 20_000))
    correct = rng.random(confidence.shape) < confidence * np.array([[0.7], [0.9], [1.0]])
    rows = cascade(confidence, correct, DIMS, SOURCE, "MRL", num_draws=3)
    greedy, joint = values(rows), values(rows, "MRL cascade, joint")
    for cap in DIMS[1:]:
        assert joint["top_1", cap][1] <= greedy["top_1", cap][1] + 0.3
        assert joint["top_1", cap][0] >= greedy["top_1", cap][0] - 0.01


def test_the_fixed_feature_model_is_scored_on_the_images_of_the_cascade():
    _, correct = images()
    # A cascade that is never sure always ends at its cap, as the fixed-feature model of that size does.
    rows = cascade(np.full((3, 200), 0.01), correct, DIMS, SOURCE, "MRL", num_draws=5)
    for g, dim in ((1, 16), (2, 32)):
        fixed = values(fixed_feature(correct[g], dim, SOURCE, num_draws=5), "FF")
        assert fixed["top_1", dim] == pytest.approx(values(rows)["top_1", dim])
        assert fixed["top_1_std", dim] == pytest.approx(values(rows)["top_1_std", dim])


def test_a_perfect_first_size_needs_nothing_more():
    rows = cascade(np.ones((3, 50)), np.ones((3, 50), dtype=bool), DIMS, SOURCE, "MRL", num_draws=2)
    for method in ("MRL cascade", "MRL cascade, joint"):
        assert values(rows, method)["top_1", 32] == (1, 8)


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


def test_dims_saved_takes_the_mean_of_several_runs():
    rows = (
        points("MRL cascade", {16: (0.6, 9)}) + points("MRL cascade", {16: (0.8, 11)}) + points("FF", {40: (0.7, 40)})
    )
    assert dims_saved(rows, "MRL cascade") == {40: 4.0}


def test_the_headline_is_the_largest_saving_and_there_is_none_without_one():
    rows = points("MRL cascade", {16: (0.70, 10), 32: (0.80, 16)}) + points("FF", {32: (0.70, 32), 64: (0.79, 64)})
    assert headlines(rows) == ["MRL cascade (digits): the accuracy of FF-64 from 16.0 dims on average, 4.0 times fewer"]
    assert headlines(points("MRL cascade", {16: (0.7, 10)}) + points("FF", {8: (0.7, 8), 32: (0.9, 32)})) == []
    assert headlines(points("MRL cascade", {16: (0.7, 10)})) == []


def test_refuses_one_size_and_too_few_images():
    confidence, correct = images()
    with pytest.raises(UserError, match="two or more sizes"):
        cascade(confidence[:1], correct[:1], [8], SOURCE, "FF")
    with pytest.raises(UserError, match="4 images"):
        cascade(confidence[:, :4], correct[:, :4], DIMS, SOURCE, "MRL")
