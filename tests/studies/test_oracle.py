from collections import Counter

import numpy as np
import pytest

from mrl.errors import UserError
from mrl.results import Source
from mrl.studies.adaptive_classification import majority_vote, oracle

SOURCE = Source("digits", "some_run", 3, 32, 28, True)


def values(rows):
    return {(row.metric, row.dim): row.value for row in rows}


def test_worked_by_hand():
    # Image 0: right from the second size on. 1: right at the last only. 2: never. 3: right, wrong, wrong.
    predictions = np.array([[5, 1, 1, 3], [0, 2, 1, 4], [0, 1, 4, 5]])
    labels = np.array([0, 1, 2, 3])
    predictions[0, 1] = 7
    rows = oracle(predictions, labels, [8, 16, 32], SOURCE, "MRL")
    found = values(rows)
    assert [found["first_correct", dim] for dim in (8, 16, 32)] == [0.25, 0.25, 0.25]
    assert found["never_correct", None] == 0.25
    assert found["top_1", None] == 0.75
    # Votes: 0 (two of three); 1 (a tie of three, the largest size); 1 for image 2, wrong; 5 for image 3, wrong.
    assert found["majority_vote_top_1", None] == 0.5
    assert {key: value for key, value in found.items() if key[0].startswith("agreement")} == {
        ("agreement_with_16", 8): 0.25,
        ("agreement_with_32", 8): 0,
        ("agreement_with_32", 16): 0.25,
    }
    [oracle_row] = [row for row in rows if row.metric == "top_1"]
    assert oracle_row.expected_dim == (16 + 32 + 32 + 8) / 4


def test_equals_a_loop_over_images():
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(4, size=(5, 200)), rng.integers(4, size=200)
    dims = [8, 16, 32, 64, 128]
    found = values(oracle(predictions, labels, dims, SOURCE, "MRL"))
    first, voted = Counter(), 0
    for of_image, label in zip(predictions.T.tolist(), labels, strict=True):
        first[next((dim for dim, c in zip(dims, of_image, strict=True) if c == label), None)] += 1
        votes = Counter(of_image)
        voted += max(reversed(of_image), key=lambda c: votes[c]) == label
    assert [found["first_correct", dim] for dim in dims] == [first[dim] / 200 for dim in dims]
    assert found["never_correct", None] == first[None] / 200
    assert found["majority_vote_top_1", None] == voted / 200


def test_first_correct_and_never_add_up_and_the_oracle_is_never_below_a_prefix():
    rng = np.random.default_rng(1)
    predictions, labels = rng.integers(3, size=(4, 99)), rng.integers(3, size=99)
    found = values(oracle(predictions, labels, [1, 2, 3, 4], SOURCE, "MRL"))
    shares = [value for (metric, _), value in found.items() if metric in ("first_correct", "never_correct")]
    assert sum(shares) == pytest.approx(1)
    assert found["top_1", None] >= (predictions == labels).mean(axis=1).max()
    assert found["top_1", None] == pytest.approx(1 - found["never_correct", None])


def test_a_tie_of_votes_goes_to_the_largest_size_among_the_most_voted():
    assert majority_vote(np.array([[3], [3], [1], [1], [9]])).tolist() == [1]
    assert majority_vote(np.array([[1], [3], [3], [1], [9]])).tolist() == [1]
    assert majority_vote(np.array([[70_000], [3], [70_000]])).tolist() == [70_000]


def test_refuses_shapes_that_do_not_fit():
    with pytest.raises(UserError, match=r"\(2, 3\)"):
        oracle(np.zeros((2, 3), int), np.zeros(4, int), [8, 16], SOURCE, "MRL")
    with pytest.raises(UserError, match=r"N >= 1"):
        oracle(np.zeros((2, 0), int), np.zeros(0, int), [8, 16], SOURCE, "MRL")
