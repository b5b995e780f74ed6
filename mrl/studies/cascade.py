"""Adaptive classification: a small prefix where it is sure, a larger one where not (section 4.2.1, table 3, figure 6).

The paper's protocol: both flips summed (see `mrl.studies.logits`), thresholds fitted on 10,000 of the
validation images and reported on the others, for 30 random draws; the fixed-feature baseline on those others too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from mrl.errors import UserError
from mrl.progress import progress
from mrl.results import Row, Source
from mrl.studies.thresholds import fit_thresholds, fit_thresholds_jointly, route

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
