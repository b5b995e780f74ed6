import numpy as np
import pytest
import torch

from mrl.errors import UserError
from mrl.matryoshka import NestedLinear
from mrl.studies.adaptive_classification import cascade_points, draws, fit_thresholds, route, run_cascade
from mrl.studies.classification import predict


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
    fit, test = next(draws(200, 1))
    predicted = predict(vectors, classifiers)
    correct = predicted.classes == labels
    thresholds = fit_thresholds(predicted.confidence[:, fit], correct[:, fit])
    chosen = route(predicted.confidence[:, test], thresholds)
    last = cascades[-1]
    assert [point.cap for point in cascades] == [4, 8] and [point.cap for point in alone] == [2, 4, 8]
    assert last.top_1 == pytest.approx(correct[:, test][chosen, np.arange(len(test))].mean())
    assert last.expected_dim == pytest.approx(np.array([2, 4, 8])[chosen].mean())
    assert last.bytes_per_image == 4 * last.expected_dim
    for point, of_size in zip(alone, correct[:, test], strict=True):
        assert point.top_1 == pytest.approx(of_size.mean()) and point.bytes_per_image == 4 * point.cap
    assert all(0 < point.us_per_image < 1e6 for point in cascades + alone)


def test_one_size_is_no_cascade(case):
    vectors, labels, classifiers = case
    with pytest.raises(UserError, match="two or more sizes"):
        cascade_points(vectors, labels, classifiers[:1])
