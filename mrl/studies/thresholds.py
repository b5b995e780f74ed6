"""Thresholds of a cascade, fitted pairwise as the paper does (section 4.2.1) or jointly, and where they send images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mrl.errors import UserError

# The paper's: 100 steps from 0.1 to 1.
THRESHOLD_GRID = np.linspace(0.1, 1, 100)
# Ours: 0 too, which is a cap; accuracy (0 to 1) that one more dim has to be worth.
JOINT_GRID = np.concatenate([[0.0], THRESHOLD_GRID])
PRICES = np.logspace(-1, -8, 36)
MAX_SWEEPS = 20


def fit_thresholds(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Thresholds ``(G-1,)`` of a cascade, as the paper fits them: greedily, each consecutive pair by itself.

    The threshold of a pair is the smallest of `THRESHOLD_GRID` at which "the smaller size where its
    confidence is above, else the larger" is right most often.

    Args:
        confidence: ``(G, N)``, above 0, at most 1: the highest softmax at each size, smallest size first.
        correct: ``(G, N)`` bool: whether the prediction is right.

    Raises:
        UserError: The shapes differ, there are no images, or a confidence is not above 0 and at most 1.
    """
    confidence, correct = check_confidence(confidence), np.asarray(correct, dtype=bool)
    if correct.shape != confidence.shape or not confidence.shape[1]:
        raise UserError(f"confidence {confidence.shape} and correct {correct.shape} must be one (G, N), N at least 1")
    gains = correct[:-1].astype(np.int64) - correct[1:]
    pairs = zip(num_below(THRESHOLD_GRID, confidence[:-1]), gains, strict=True)
    best = [np.argmax(gain_above(below, gain, len(THRESHOLD_GRID))) for below, gain in pairs]
    return THRESHOLD_GRID[np.array(best, dtype=np.int64)]


def route(confidence: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The granularity ``(N,)`` int64 that classifies each image: the first whose confidence is above its threshold.

    A threshold of 0 always stops, one of 1 never; the last granularity has none and takes what is left.

    Args:
        confidence: ``(G, N)``, above 0, at most 1.
        thresholds: ``(G-1,)``. Fewer of both, ``confidence[: c + 1]`` and ``thresholds[:c]``, is a
            cascade that is capped at granularity c.

    Raises:
        UserError: The number of thresholds is not G-1, or a confidence is not above 0 and at most 1.
    """
    confidence, thresholds = check_confidence(confidence), np.asarray(thresholds, dtype=np.float64)
    if thresholds.shape != (len(confidence) - 1,):
        raise UserError(
            f"a cascade of {len(confidence)} sizes has {len(confidence) - 1} thresholds, but was given "
            f"{thresholds.shape}"
        )
    stops = np.concatenate([confidence[:-1] > thresholds[:, None], np.ones((1, confidence.shape[1]), dtype=bool)])
    return stops.argmax(axis=0)


def num_below(grid: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """How many thresholds of the ascending ``grid`` are below each confidence, in its shape."""
    return np.searchsorted(grid, confidence.astype(np.float64), side="left")


def gain_above(below: np.ndarray, gain: np.ndarray, num_thresholds: int) -> np.ndarray:
    """For each threshold, the sum of ``gain`` ``(N,)`` over the confidences above it, of which `num_below` is given."""
    sums = np.bincount(below, weights=gain, minlength=num_thresholds + 1)
    return sums[::-1].cumsum()[::-1][1:]


def check_confidence(confidence: np.ndarray) -> np.ndarray:
    """``confidence`` as an array, once it is known to be ``(G, N)`` numbers above 0 and at most 1."""
    confidence = np.asarray(confidence)
    if confidence.ndim != 2 or not len(confidence):
        raise UserError(f"confidence has shape {confidence.shape}; allowed is (G, N), a row for each size")
    if not ((confidence > 0) & (confidence <= 1)).all():
        raise UserError(
            "confidence holds a value that is not above 0 and at most 1; give the highest softmax of each image"
        )
    return confidence


def fit_thresholds_jointly(
    confidence: np.ndarray, correct: np.ndarray, dims: Sequence[int], targets: Sequence[float]
) -> np.ndarray:
    """Thresholds ``(T, G-1)``, for each target the most accurate found whose expected dim is at most the target.

    Not in the paper, whose rule looks at pairs one by one. Here all thresholds together maximise accuracy minus a
    price per dim, by coordinate ascent, for prices over seven decades. The paper's thresholds at every cap are
    among the candidates (a threshold of 0 is a cap), so on the fitting images none of them is more accurate at
    its own expected dim.

    Args:
        confidence: ``(G, N)``, above 0, at most 1.
        correct: ``(G, N)`` bool.
        dims: G prefix sizes, ascending.
        targets: T expected dims, each at least the smallest size.

    Raises:
        UserError: As `fit_thresholds`, or a target is below the smallest size.
    """
    greedy = fit_thresholds(confidence, correct)
    if len(dims) != len(confidence) or min(targets) < dims[0]:
        raise UserError(
            f"targets {list(targets)} must be {dims[0]} dims or more, and the {len(dims)} sizes those fitted"
        )
    confidence, correct = np.asarray(confidence), np.asarray(correct, dtype=bool)
    found = [np.where(np.arange(len(greedy)) < cap, greedy, 0.0) for cap in range(len(dims))]
    scores = [_accuracy_and_dim(confidence, correct, dims, thresholds) for thresholds in found]
    below = num_below(JOINT_GRID, confidence[:-1])
    for price in PRICES:
        start = found[int(np.argmax([accuracy - price * dim for accuracy, dim in scores]))]
        found.append(_ascend(confidence, below, correct - price * np.asarray(dims)[:, None], start))
        scores.append(_accuracy_and_dim(confidence, correct, dims, found[-1]))
    allowed = [[(-a, d, i) for i, (a, d) in enumerate(scores) if d <= target + 1e-9] for target in targets]
    return np.array([found[min(of_target)[2]] for of_target in allowed])


def _accuracy_and_dim(
    confidence: np.ndarray, correct: np.ndarray, dims: Sequence[int], thresholds: np.ndarray
) -> tuple[float, float]:
    chosen = route(confidence, thresholds)
    return float(correct[chosen, np.arange(len(chosen))].mean()), float(np.asarray(dims)[chosen].mean())


def _ascend(confidence: np.ndarray, below: np.ndarray, utility: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Thresholds ``(G-1,)`` that no change of a single one improves: the mean ``utility`` ``(G, N)`` of the routed."""
    thresholds, best = start.copy(), -np.inf
    for _ in range(MAX_SWEEPS):
        stops = confidence[:-1] > thresholds[:, None]
        arrives = np.cumprod(np.concatenate([np.ones_like(stops[:1]), ~stops[:-1]]), axis=0, dtype=np.int64)
        onward = utility[-1]
        # From the last to the first: which images arrive depends on earlier thresholds only.
        for g in reversed(range(len(thresholds))):
            gain = np.where(arrives[g], utility[g] - onward, 0.0)
            thresholds[g] = JOINT_GRID[np.argmax(gain_above(below[g], gain, len(JOINT_GRID)))]
            onward = np.where(confidence[g] > thresholds[g], utility[g], onward)
        if onward.mean() <= best + 1e-12:
            break
        best = onward.mean()
    return thresholds
