import numpy as np
import pytest
import torch

from mrl.retrieval.search import Best, pack, unpack


def test_a_key_is_larger_for_a_higher_score_and_of_equals_for_a_lower_index():
    scores = torch.tensor([torch.inf, 1.0, 0.5, 1e-40, 0.0, -1e-40, -1.0, -2.0, -torch.inf]).repeat_interleave(5)
    indices = torch.tensor([0, 1, 7, 2**31, 2**32 - 1]).repeat(9)
    keys = pack(scores, indices)
    assert (keys.diff() < 0).all()
    back_indices, back_scores = unpack(keys)
    assert torch.equal(back_indices, indices)
    assert torch.equal(back_scores, scores)


def test_zero_and_minus_zero_are_equal_scores():
    keys = pack(torch.tensor([-0.0, 0.0, -0.0]), torch.tensor([1, 2, 3]))
    assert (keys.diff() < 0).all()


@pytest.mark.parametrize("k", [1, 10, 70, 640])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal", "few values"])
def test_the_best_of_blocks_are_those_of_a_stable_sort(k, order):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((9, 640)).astype(np.float32)
    scores = {
        "random": scores,
        "ascending": np.sort(scores),
        "descending": -np.sort(-scores),
        "equal": np.zeros_like(scores),
        "few values": np.round(scores),
    }[order]
    best = Best(9, k, "cpu")
    for indices in rng.permutation(640).reshape(5, 128):
        block = torch.from_numpy(scores[:, indices])
        for rows in (slice(0, 5), slice(5, 9)):
            few = block[rows].contiguous(), torch.ones(128), torch.ones(len(block[rows]), 1)
            best.add(rows, *few, torch.from_numpy(indices))
    indices, found = best.ordered()
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, axis=1))
