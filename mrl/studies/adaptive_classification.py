"""Adaptive classification with a cascade of prefixes: use a larger one when confidence is low (section 4.2.1, table 3).

From top to bottom: thresholds and routing; the paper's protocol over random splits; the oracle and agreement of
prefixes (appendix J, tables 22 and 23); a cascade in use, with measured time and bytes.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError
from mrl.matryoshka import prefix
from mrl.model import MatryoshkaClassifier
from mrl.progress import progress
from mrl.results import Row, Source
from mrl.studies.adaptive_retrieval import timed
from mrl.studies.classification import Classifier, predict

STUDY, ORACLE_STUDY = "cascade", "oracle"
CASCADE = "{} cascade"  # the method in rows, of "MRL"
# The paper's: 100 steps from 0.1 to 1.
THRESHOLD_GRID = np.linspace(0.1, 1, 100)
NUM_SPLITS = 30
BYTES_PER_NUMBER = 4


def fit_thresholds(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return the thresholds ``(G-1,)`` of a cascade, fitted as in the paper: greedily, each consecutive pair alone.

    The threshold of a pair is the smallest of `THRESHOLD_GRID` at which "the smaller size if its confidence is above
    the threshold, else the larger" is most accurate.

    Args:
        confidence: ``(G, N)``, the highest softmax at each size, smallest size first.
        correct: ``(G, N)`` bool.

    Raises:
        UserError: The shapes differ, there are no images, or a confidence is not above 0 and at most 1.
    """
    confidence, correct = _check_confidence(confidence), np.asarray(correct, dtype=bool)
    if correct.shape != confidence.shape or not confidence.shape[1]:
        raise UserError(f"confidence {confidence.shape} and correct {correct.shape} must both be (G, N) with N >= 1")
    thresholds = []
    for of_size, gain in zip(confidence[:-1], correct[:-1].astype(np.int64) - correct[1:], strict=True):
        # Summed over the images whose confidence is above each threshold.
        below = np.searchsorted(THRESHOLD_GRID, of_size)
        sums = np.bincount(below, gain, minlength=len(THRESHOLD_GRID) + 1)[:0:-1].cumsum()[::-1]
        thresholds.append(THRESHOLD_GRID[sums.argmax()])
    return np.array(thresholds)


def route(confidence: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the granularity ``(N,)`` int64 that classifies each image: the first one above its threshold, or the last.

    Args:
        confidence: ``(G, N)``, above 0, at most 1.
        thresholds: ``(G-1,)``. For a cascade that is capped at granularity c, pass ``confidence[: c + 1]`` and
            ``thresholds[:c]``.

    Raises:
        UserError: The number of thresholds is not G-1, or a confidence is not above 0 and at most 1.
    """
    confidence, thresholds = _check_confidence(confidence), np.asarray(thresholds, dtype=np.float64)
    if thresholds.shape != (len(confidence) - 1,):
        raise UserError(f"{len(confidence)} sizes need {len(confidence) - 1} thresholds, but given {thresholds.shape}")
    stops = np.concatenate([confidence[:-1] > thresholds[:, None], np.ones((1, confidence.shape[1]), dtype=bool)])
    return stops.argmax(axis=0)


def _check_confidence(confidence: np.ndarray) -> np.ndarray:
    confidence = np.asarray(confidence)
    if confidence.ndim != 2 or not ((confidence > 0) & (confidence <= 1)).all():
        raise UserError(f"confidence {confidence.shape} must be (G, N), the highest softmax: above 0 and at most 1")
    return confidence


def splits(num_images: int, num_splits: int = NUM_SPLITS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield indices to fit on and the remaining indices to report on, for each random split.

    Fits use 10,000 images, or a fifth (at least one) of fewer than 50,000. Split i is the same for every model.
    """
    if num_images < 2:
        raise UserError(f"a cascade needs 2 or more validation images to fit thresholds, but there are {num_images}")
    num_fit = 10_000 if num_images >= 50_000 else max(1, num_images // 5)
    for split in range(num_splits):
        order = np.random.default_rng(split).permutation(num_images)
        yield np.sort(order[:num_fit]), np.sort(order[num_fit:])


def cascade(
    confidence: np.ndarray,
    correct: np.ndarray,
    dims: Sequence[int],
    source: Source,
    method: str,
    num_splits: int = NUM_SPLITS,
) -> list[Row]:
    """Return rows of accuracy and expected dim, one point per cap (``dim``, the largest size allowed).

    Of method "<method> cascade"; metrics, each with `expected_dim`:

    - "top_1": mean accuracy over the splits; mean size of the deciding prefix.
    - "top_1_std": their standard deviations over the splits.
    - "top_1_cumulative": the same accuracy; the sizes of all prefixes tried, added up.
    - "threshold", "threshold_std": of size ``dim``.
    """
    name, sizes, fitted, scores = CASCADE.format(method), np.asarray(dims), [], []
    bar = progress(splits(confidence.shape[1], num_splits), desc=f"{source.run}: {STUDY}", total=num_splits)
    for fit, test in bar:
        thresholds = fit_thresholds(confidence[:, fit], correct[:, fit])
        fitted.append(thresholds)
        chosen = [route(confidence[: cap + 1, test], thresholds[:cap]) for cap in range(1, len(dims))]
        scores.append([(correct[g, test].mean(), sizes[g].mean(), sizes.cumsum()[g].mean()) for g in chosen])
    n, rows = len(test), []
    for cap, of_cap in zip(dims[1:], np.transpose(scores, (1, 2, 0)).tolist(), strict=True):
        (top_1, used, tried), (top_1_std, used_std, _) = map(statistics.mean, of_cap), map(statistics.stdev, of_cap)
        rows += [
            source.row(STUDY, name, "top_1", top_1, n, dim=cap, expected_dim=used),
            source.row(STUDY, name, "top_1_std", top_1_std, n, dim=cap, expected_dim=used_std),
            source.row(STUDY, name, "top_1_cumulative", top_1, n, dim=cap, expected_dim=tried),
        ]
    for dim, of_dim in zip(dims[:-1], np.transpose(fitted).tolist(), strict=True):
        rows.append(source.row(STUDY, name, "threshold", statistics.mean(of_dim), n, dim=dim))
        rows.append(source.row(STUDY, name, "threshold_std", statistics.stdev(of_dim), n, dim=dim))
    return rows


def fixed_feature(correct: np.ndarray, dim: int, source: Source, num_splits: int = NUM_SPLITS) -> list[Row]:
    """Return rows "top_1", "top_1_std" of a fixed-feature model, ``correct`` ``(N,)``, on the splits of `cascade`."""
    tests = [test for _, test in splits(len(correct), num_splits)]
    accuracies = [float(correct[test].mean()) for test in tests]
    values = {"top_1": (statistics.mean(accuracies), float(dim)), "top_1_std": (statistics.stdev(accuracies), 0.0)}
    return [
        source.row(STUDY, "FF", metric, value, len(tests[0]), dim=dim, expected_dim=expected)
        for metric, (value, expected) in values.items()
    ]


def dims_saved(rows: Sequence[Row], method: str) -> dict[int, float | None]:
    """Return ``{FF size: how many times fewer dims the cascade needs for the same accuracy}``; None if it never does.

    The paper's "14x" (section 4.2.1) is such a ratio: 512 dims to an expected 37. ``rows`` are of one dataset;
    ``method`` is e.g. "MRL cascade". Points of several runs are averaged.
    """
    points = [row for row in rows if (row.study, row.metric) == (STUDY, "top_1")]
    columns = ["method", "dim", "value", "expected_dim"]
    means = pd.DataFrame(map(vars, points), columns=columns).groupby(["method", "dim"]).mean().reset_index()
    found = means[means["method"] == method]
    ratios: dict[int, float | None] = {}
    for of_ff in means[means["method"] == "FF"].itertuples():
        enough = found["expected_dim"][found["value"] >= of_ff.value]
        ratios[int(of_ff.dim)] = float(of_ff.dim / enough.min()) if len(enough) else None
    return ratios


def headlines(rows: Sequence[Row]) -> list[str]:
    """Return one sentence per cascade about the largest of its `dims_saved`, if there is a saving."""
    sentences = []
    for method in sorted({row.method for row in rows if row.study == STUDY and row.method != "FF"}):
        ratio, dim = max(((ratio or 0, dim) for dim, ratio in dims_saved(rows, method).items()), default=(0, 0))
        if ratio > 1:
            sentences.append(
                f"{method} ({rows[0].dataset}): the accuracy of FF-{dim} from {dim / ratio:.1f} dims on average, "
                f"{ratio:.1f} times fewer"
            )
    return sentences


def oracle(predictions: np.ndarray, labels: np.ndarray, dims: Sequence[int], source: Source, method: str) -> list[Row]:
    """Return rows of the oracle over prefixes, of the majority vote and of agreement, all as shares of the images.

    Of ``predictions`` ``(G, N)``, the classes at each of ``dims``, smallest first, the metrics are:

    - "first_correct", for each ``dim``: this is the smallest correct prefix (table 22).
    - "never_correct": no prefix is correct.
    - "top_1": some prefix is correct (table 23); expected dim of choosing the smallest correct one, or the largest of
      all if none is.
    - "majority_vote_top_1": the class that most prefixes predict is correct; of a tie, that of its largest size.
    - "agreement_with_<larger size>", for each smaller ``dim``: both predict the same class.
    """
    correct = predictions == labels
    any_correct = correct.any(axis=0)
    first = np.where(any_correct, correct.argmax(axis=0), -1)
    expected = float(np.asarray(dims)[first].mean())  # -1, never correct, selects the largest
    votes = (predictions[:, None] == predictions).sum(axis=0)
    last_of_most = len(dims) - 1 - votes[::-1].argmax(axis=0)

    def row(metric: str, of_images: np.ndarray, **rest: Any) -> Row:
        return source.row(ORACLE_STUDY, method, metric, float(of_images.mean()), len(labels), **rest)

    rows = [row("first_correct", first == g, dim=dim) for g, dim in enumerate(dims)]
    rows.append(row("never_correct", ~any_correct))
    rows.append(row("top_1", any_correct, expected_dim=expected))
    rows.append(row("majority_vote_top_1", correct[last_of_most, np.arange(len(labels))]))
    for (g, dim), (other, other_dim) in itertools.combinations(enumerate(dims), 2):
        rows.append(row(f"agreement_with_{other_dim}", predictions[g] == predictions[other], dim=dim))
    return rows


class CascadePoint(NamedTuple):
    """A cascade that may go up to size ``cap``, or one classifier alone, on images that no threshold was fitted on."""

    cap: int  # in dims
    top_1: float
    expected_dim: float  # mean size that decided
    bytes_per_image: float  # mean bytes read of an embedding
    us_per_image: float  # microseconds from embeddings to classes, all images in one batch


def run_cascade(vectors: Tensor, classifiers: Sequence[Classifier], thresholds: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return predicted classes ``(N,)`` and deciding granularities ``(N,)`` of raw embeddings ``(N, D)``.

    Equal to `route` on the confidences of all sizes, but a size computes only the images left undecided before it.
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
    """Return a point of the cascade per cap from the second size on, and one of each size's classifier alone.

    Thresholds are fitted as in the paper on the first of `splits` of the raw validation embeddings ``(N, D)``; accuracy
    and time are of its other images, on the CPU.
    """
    fit, test = next(splits(len(vectors), 1))
    fitted = predict(vectors[fit], classifiers)
    thresholds = fit_thresholds(fitted.confidence, fitted.classes == labels[fit])
    z, truth = torch.from_numpy(np.array(vectors[test])), torch.from_numpy(np.array(labels[test]))
    cascades = [_point(z, truth, classifiers[: cap + 1], thresholds[:cap]) for cap in range(1, len(classifiers))]
    alone = [_point(z, truth, [classifier], thresholds[:0]) for classifier in classifiers]
    return cascades, alone


def describe_cascade(cascades: Sequence[CascadePoint], alone: Sequence[CascadePoint]) -> str:
    """Return what the cascade up to full width saves beside single sizes, in two sentences."""
    last, full = cascades[-1], alone[-1]
    enough = next(point for point in alone if point.top_1 >= min(last.top_1, full.top_1))
    return (
        f"Up to {last.cap} dims, the cascade reads {last.expected_dim:.1f} dims on average and is right for "
        f"{last.top_1:.1%} of the images; full width is right for {full.top_1:.1%}. The smallest single size that "
        f"is as accurate as the cascade, or as full width, has {enough.cap} dims ({enough.top_1:.1%})."
    )


def _point(z: Tensor, labels: Tensor, classifiers: Sequence[Classifier], thresholds: np.ndarray) -> CascadePoint:
    (classes, chosen), seconds = timed(run_cascade, z, classifiers, thresholds)
    dims = torch.tensor([weight.shape[1] for weight, _ in classifiers], dtype=torch.float64)
    expected, top_1 = float(dims[chosen].mean()), float((classes == labels).double().mean())
    # A larger prefix contains the smaller ones: nothing is read twice.
    return CascadePoint(int(dims[-1]), top_1, expected, BYTES_PER_NUMBER * expected, 1e6 * seconds / len(z))


@torch.inference_mode()
def backbone_ms_per_image(model: MatryoshkaClassifier, px: int) -> float:
    """Return the backbone's measured CPU milliseconds per image of ``px`` x ``px``, 64 in one batch."""
    images = torch.rand(64, 3, px, px)  # what they show does not matter
    return 1000 * timed(model.embed, images)[1] / len(images)
