"""What a perfect choice of prefix would give, and how far the prefixes agree (appendix J, tables 22 and 23)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mrl.errors import UserError
from mrl.results import Row, Source

STUDY = "oracle"


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
        source.row(STUDY, method, "first_correct", float((first == g).mean()), n, dim=dim) for g, dim in enumerate(dims)
    ]
    rows += [
        source.row(STUDY, method, "never_correct", float((~any_correct).mean()), n),
        source.row(STUDY, method, "top_1", float(any_correct.mean()), n, expected_dim=expected),
        source.row(STUDY, method, "majority_vote_top_1", vote, n),
    ]
    for (g, dim), (other, other_dim) in itertools.combinations(enumerate(dims), 2):
        same = float((predictions[g] == predictions[other]).mean())
        rows.append(source.row(STUDY, method, f"agreement_with_{other_dim}", same, n, dim=dim))
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
