"""Thresholds of a cascade, fitted pairwise as the paper does (section 4.2.1) or jointly, and where they send images.

Adaptive classification: a small prefix where it is sure, a larger one where not (section 4.2.1, table 3, figure 6).

The paper's protocol: both flips summed (see `mrl.studies.classification`), thresholds fitted on 10,000 of the
validation images and reported on the others, for 30 random draws; the fixed-feature baseline on those others too.

What a perfect choice of prefix would give, and how far the prefixes agree (appendix J, tables 22 and 23).

What adaptive classification and retrieval take in use: measured milliseconds and bytes, beside quality.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError
from mrl.matryoshka import prefix
from mrl.model import MatryoshkaClassifier
from mrl.progress import progress
from mrl.results import Row, Source
from mrl.studies.classification import Classifier, predict

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

    Not in the paper, whose rule looks at pairs one by one. Here all thresholds together maximize accuracy minus a
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


STUDY = "cascade"
NUM_DRAWS = 30
NUM_FIT, ENOUGH_FOR_NUM_FIT = 10_000, 50_000
# What a cascade of "MRL" is called in the rows, with the paper's thresholds and with ours.
GREEDY, JOINT = "{} cascade", "{} cascade, joint"


def draws(num_images: int, num_draws: int = NUM_DRAWS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and rows to report on, disjoint and together all, for each draw.

    10,000 are fitted on, or a fifth where there are fewer than 50,000 images. Draw i is the same for
    every model, so that all are compared on the same images.

    Raises:
        UserError: There are fewer than 5 images or no draws.
    """
    if num_images < 5 or num_draws < 1:
        raise UserError(f"{num_draws} draws of {num_images} images were asked for; allowed: 1 or more, of 5 or more")
    num_fit = NUM_FIT if num_images >= ENOUGH_FOR_NUM_FIT else num_images // 5
    for draw in range(num_draws):
        order = np.random.default_rng(draw).permutation(num_images)
        yield np.sort(order[:num_fit]), np.sort(order[num_fit:])


def cascade(
    confidence: np.ndarray,
    correct: np.ndarray,
    dims: Sequence[int],
    source: Source,
    method: str,
    num_draws: int = NUM_DRAWS,
) -> list[Row]:
    """Rows of accuracy and expected dim, a point per cap (``dim``: the largest size allowed), means over draws.

    Of method "<method> cascade", the paper's, and "<method> cascade, joint", thresholds fitted jointly to the
    same expected dims on the same images. Metrics, each with `expected_dim`:

    - "top_1": mean accuracy; mean of the dims of the prefix that decided.
    - "top_1_std": their standard deviations over the draws.
    - "top_1_cumulative": the same accuracy; the dims of all prefixes tried, added up.
    - "threshold", "threshold_std": of the size ``dim``, the paper's way.

    Args:
        confidence: ``(G, N)``, above 0, at most 1.
        correct: ``(G, N)`` bool.
        dims: G prefix sizes, ascending, at least two.
        source: What the rows are of; its flip is True where the logits of both flips were added.
        method: What the model is called, e.g. "MRL".
        num_draws: Random splits into fitting and reporting images.

    Raises:
        UserError: There is one size only, or as `draws` and `fit_thresholds`.
    """
    if len(dims) < 2 or len(dims) != len(confidence):
        raise UserError(f"a cascade needs two or more sizes, each with confidences; given sizes {list(dims)}")
    methods = (GREEDY.format(method), JOINT.format(method))
    points: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    thresholds: list[np.ndarray] = []
    num_test = 0
    splits = draws(confidence.shape[1], num_draws)
    for fit, test in progress(splits, desc=f"{source.run}: {STUDY}", total=num_draws, unit="draw"):
        greedy, joint = _fit(confidence[:, fit], correct[:, fit], dims)
        thresholds.append(greedy[-1])
        num_test = len(test)
        for name, of_caps in zip(methods, (greedy, joint), strict=True):
            for cap, of_cap in zip(dims[1:], of_caps, strict=True):
                point = _score(confidence[:, test], correct[:, test], dims, of_cap)
                points.setdefault((name, cap), []).append(point)
    rows = [row for (name, cap), found in points.items() for row in _rows_of_cap(found, name, cap, source, num_test)]
    for dim, of_size in zip(dims[:-1], np.transpose(thresholds).tolist(), strict=True):
        for metric, value in (("threshold", statistics.mean(of_size)), ("threshold_std", spread(of_size))):
            rows.append(source.row(STUDY, methods[0], metric, value, num_test, dim=dim))
    return rows


def fixed_feature(
    correct: np.ndarray, dim: int, source: Source, method: str = "FF", num_draws: int = NUM_DRAWS
) -> list[Row]:
    """Rows "top_1" and "top_1_std" of one fixed-feature model on the images that `cascade` reports on.

    Args:
        correct: ``(N,)`` bool, in the order of the cascade's images.
        dim: Its size.
        source: What the rows are of.
        method: The rows' method.
        num_draws: As in `cascade`.
    """
    splits = [test for _, test in draws(len(correct), num_draws)]
    accuracies = [float(correct[test].mean()) for test in splits]
    values = {"top_1": (statistics.mean(accuracies), float(dim)), "top_1_std": (spread(accuracies), 0.0)}
    return [
        source.row(STUDY, method, metric, value, len(splits[0]), dim=dim, expected_dim=expected)
        for metric, (value, expected) in values.items()
    ]


def dims_saved(rows: Sequence[Row], method: str, tolerance: float = 0.0) -> dict[int, float | None]:
    """``{FF size: how many times fewer dims the cascade needs for its accuracy}``; None where it never reaches it.

    The paper's "14x" (section 4.2.1) is such a ratio: 512 dims to an expected 37. Only points of the cascade
    count that are as accurate as the fixed-feature model, to ``tolerance`` (0.001 is a tenth of a percent).

    Args:
        rows: Of `cascade` and `fixed_feature`, of one dataset; where several runs share a point, their mean counts.
        method: The cascade's, e.g. "MRL cascade".
        tolerance: 0 to 1.
    """
    cascades, fixed = (_mean_points(rows, wanted) for wanted in (method, "FF"))
    ratios: dict[int, float | None] = {}
    for dim, (accuracy, _) in sorted(fixed.items()):
        enough = [expected for found, expected in cascades.values() if found >= accuracy - tolerance]
        ratios[dim] = dim / min(enough) if enough else None
    return ratios


def headlines(rows: Sequence[Row]) -> list[str]:
    """A sentence a cascade on the largest of `dims_saved`, for people to read; none where no dims are saved."""
    found = []
    for method in sorted({row.method for row in rows if row.study == STUDY and row.method != "FF"}):
        saved = {dim: ratio for dim, ratio in dims_saved(rows, method).items() if ratio is not None and ratio > 1}
        if saved:
            dim = max(saved, key=lambda dim: saved[dim])
            found.append(
                f"{method} ({rows[0].dataset}): the accuracy of FF-{dim} from {dim / saved[dim]:.1f} dims on average, "
                f"{saved[dim]:.1f} times fewer"
            )
    return found


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _fit(confidence: np.ndarray, correct: np.ndarray, dims: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Thresholds for each cap from the second size on: the paper's, ``(c,)`` at cap c, and the joint ones, all."""
    pairwise = fit_thresholds(confidence, correct)
    greedy = [pairwise[:c] for c in range(1, len(dims))]
    targets = [np.asarray(dims)[route(confidence[: c + 1], pairwise[:c])].mean() for c in range(1, len(dims))]
    return greedy, list(fit_thresholds_jointly(confidence, correct, dims, targets))


def _score(
    confidence: np.ndarray, correct: np.ndarray, dims: Sequence[int], thresholds: np.ndarray
) -> tuple[float, float, float]:
    """Accuracy, expected dim, and expected sum of the dims tried."""
    sizes = np.asarray(dims[: len(thresholds) + 1])
    chosen = route(confidence[: len(sizes)], thresholds)
    right = correct[chosen, np.arange(len(chosen))].mean()
    return float(right), float(sizes[chosen].mean()), float(sizes.cumsum()[chosen].mean())


def _rows_of_cap(
    found: Sequence[tuple[float, float, float]], method: str, cap: int, source: Source, n: int
) -> list[Row]:
    accuracies, used, tried = zip(*found, strict=True)
    values = {
        "top_1": (statistics.mean(accuracies), statistics.mean(used)),
        "top_1_std": (spread(accuracies), spread(used)),
        "top_1_cumulative": (statistics.mean(accuracies), statistics.mean(tried)),
    }
    return [
        source.row(STUDY, method, metric, value, n, dim=cap, expected_dim=expected)
        for metric, (value, expected) in values.items()
    ]


def _mean_points(rows: Sequence[Row], method: str) -> dict[int, tuple[float, float]]:
    """``{dim: (accuracy, expected dim)}`` of a method, means over its runs."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        wanted = (row.study, row.method, row.metric) == (STUDY, method, "top_1")
        if wanted and row.dim is not None and row.expected_dim is not None:
            found.setdefault(row.dim, []).append((row.value, row.expected_dim))
    return {dim: (float(np.mean([a for a, _ in of])), float(np.mean([e for _, e in of]))) for dim, of in found.items()}


STUDY_ORACLE = "oracle"


def oracle(predictions: np.ndarray, labels: np.ndarray, dims: Sequence[int], source: Source, method: str) -> list[Row]:
    """Rows of the oracle over prefixes, of the majority vote and of agreement, all as shares of the images.

    Metrics:

    - "first_correct", of each ``dim``: the smallest right prefix is this one (table 22).
    - "never_correct": no prefix is right.
    - "top_1": some prefix is right (table 23), with the expected dim of choosing the smallest
      right one, or the largest of all where none is.
    - "majority_vote_top_1": the class that most prefixes predict is right; of classes with equally
      many votes, the one that the largest prefix among their voters predicts.
    - "agreement_with_<larger size>", of each smaller ``dim``: both predict the same class.

    Args:
        predictions: Classes ``(G, N)`` int64, smallest size first.
        labels: ``(N,)`` int64.
        dims: G prefix sizes, ascending.
        source: What the rows are of.
        method: The rows' method.

    Raises:
        UserError: The shapes do not fit each other, or there are no images.
    """
    check_predictions(predictions, labels, dims)
    correct, n = predictions == labels, len(labels)
    any_correct = correct.any(axis=0)
    first = np.where(any_correct, correct.argmax(axis=0), -1)
    expected = float(np.asarray(dims)[first].mean())  # -1, never right, is the largest
    vote = float((majority_vote(predictions) == labels).mean())
    rows = [
        source.row(STUDY_ORACLE, method, "first_correct", float((first == g).mean()), n, dim=dim)
        for g, dim in enumerate(dims)
    ]
    rows += [
        source.row(STUDY_ORACLE, method, "never_correct", float((~any_correct).mean()), n),
        source.row(STUDY_ORACLE, method, "top_1", float(any_correct.mean()), n, expected_dim=expected),
        source.row(STUDY_ORACLE, method, "majority_vote_top_1", vote, n),
    ]
    for (g, dim), (other, other_dim) in itertools.combinations(enumerate(dims), 2):
        same = float((predictions[g] == predictions[other]).mean())
        rows.append(source.row(STUDY_ORACLE, method, f"agreement_with_{other_dim}", same, n, dim=dim))
    return rows


def majority_vote(predictions: np.ndarray) -> np.ndarray:
    """The class ``(N,)`` that most of ``predictions`` ``(G, N)`` name; of equals, that of the last granularity."""
    votes = sum((predictions == of_one).astype(np.int64) for of_one in predictions)
    last_of_most = len(predictions) - 1 - np.argmax(votes[::-1], axis=0)
    return predictions[last_of_most, np.arange(predictions.shape[1])]


def check_predictions(predictions: np.ndarray, labels: np.ndarray, dims: Sequence[int]) -> None:
    """Nothing, if there is a prediction for each size and image, and at least one image.

    Raises:
        UserError: There is not.
    """
    if predictions.shape != (len(dims), len(labels)) or not len(labels):
        raise UserError(
            f"predictions {predictions.shape} must be (G, N), for {len(dims)} sizes and {len(labels)} labels, N >= 1"
        )


BYTES_PER_NUMBER = 4
REPEATS = 5


class CascadePoint(NamedTuple):
    """A cascade that may go up to size ``cap``, or one classifier alone.

    Attributes:
        cap: Largest size that may decide, in dims.
        top_1: Accuracy on the images that no threshold was fitted on.
        expected_dim: Mean size that decided.
        bytes_per_image: Of the embedding, that were read to decide, mean.
        us_per_image: Measured microseconds an image, from embeddings to classes, all in one batch.
    """

    cap: int
    top_1: float
    expected_dim: float
    bytes_per_image: float
    us_per_image: float


def run_cascade(vectors: Tensor, classifiers: Sequence[Classifier], thresholds: np.ndarray) -> tuple[Tensor, Tensor]:
    """Predicted classes ``(N,)`` and the granularity ``(N,)`` that decided, larger prefixes read only where needed.

    The same as `mrl.route` on the confidences of all sizes, but here the classifier of a size sees only the images
    that no smaller one was sure of.

    Args:
        vectors: Embeddings ``(N, D)``, raw.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of G sizes, ascending.
        thresholds: ``(G-1,)``.
    """
    classes = torch.empty(len(vectors), dtype=torch.int64)
    chosen = torch.empty(len(vectors), dtype=torch.int64)
    left = torch.arange(len(vectors))
    for g, (weight, bias) in enumerate(classifiers):
        logits = F.linear(prefix(vectors[left], weight.shape[1]), weight, bias)
        best, of_size = logits.max(dim=1)
        confidence = (best - logits.logsumexp(dim=1)).exp().clamp(max=1).double()
        sure = confidence > thresholds[g] if g < len(thresholds) else torch.ones_like(confidence, dtype=torch.bool)
        classes[left[sure]], chosen[left[sure]] = of_size[sure], g
        left = left[~sure]
    return classes, chosen


@torch.inference_mode()
def cascade_points(
    vectors: np.ndarray, labels: np.ndarray, classifiers: Sequence[Classifier]
) -> tuple[list[CascadePoint], list[CascadePoint]]:
    """Points of the cascade, one per cap from the second size on, and of each size's classifier alone.

    Thresholds are fitted as the paper does on the first of `draws`; everything is scored and timed on the others of
    ``vectors``, on the CPU, the shortest of five times.

    Args:
        vectors: Embeddings ``(N, D)`` of validation images, raw.
        labels: ``(N,)`` int64.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of G sizes, ascending.

    Raises:
        UserError: There is one size only, or there are fewer than 5 images.
    """
    if len(classifiers) < 2:
        raise UserError("a cascade needs two or more sizes, but was given one")
    fit, test = next(draws(len(vectors), 1))
    fitted = predict(vectors[fit], classifiers)
    thresholds = fit_thresholds(fitted.confidence, fitted.classes == labels[fit])
    z, truth = torch.from_numpy(np.array(vectors[test])), torch.from_numpy(np.array(labels[test]))
    cascades = [_point(z, truth, classifiers[: cap + 1], thresholds[:cap]) for cap in range(1, len(classifiers))]
    alone = [_point(z, truth, [classifier], thresholds[:0]) for classifier in classifiers]
    return cascades, alone


@torch.inference_mode()
def backbone_ms_per_image(model: MatryoshkaClassifier, images: Tensor) -> float:
    """Measured milliseconds an image of the backbone, on the CPU, ``images`` ``(B, 3, H, W)`` in one batch."""
    return 1000 * _fastest(lambda: model.embed(images), 3) / len(images)


def _point(z: Tensor, labels: Tensor, classifiers: Sequence[Classifier], thresholds: np.ndarray) -> CascadePoint:
    classes, chosen = run_cascade(z, classifiers, thresholds)
    seconds = _fastest(lambda: run_cascade(z, classifiers, thresholds), REPEATS)
    dims = torch.tensor([weight.shape[1] for weight, _ in classifiers], dtype=torch.float64)
    expected = float(dims[chosen].mean())
    top_1 = float((classes == labels).double().mean())
    # A larger prefix holds the smaller ones: what was read once is not read again.
    return CascadePoint(int(dims[-1]), top_1, expected, BYTES_PER_NUMBER * expected, 1e6 * seconds / len(z))


def _fastest(function, repeats: int) -> float:  # type: ignore[no-untyped-def]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
