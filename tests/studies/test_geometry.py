import numpy as np
import pytest

from mrl.errors import UserError
from mrl.studies.geometry import blocks, cosines, effective_rank, maps, spread_rows


def test_effective_rank_counts_equal_directions_and_ignores_rotation_and_scale():
    rng = np.random.default_rng(0)
    orthonormal = np.linalg.qr(rng.normal(size=(50, 5)))[0]
    assert effective_rank(orthonormal) == pytest.approx(5)
    assert effective_rank(7 * orthonormal @ np.linalg.qr(rng.normal(size=(5, 5)))[0]) == pytest.approx(5)
    assert effective_rank(np.outer(rng.normal(size=50), [1, 2, 3])) == pytest.approx(1)
    assert effective_rank(np.zeros((50, 3))) == 0
    # Shares 3/4 and 1/4 of the variance: exp(-(3/4 log 3/4 + 1/4 log 1/4)).
    two = orthonormal[:, :2] * np.sqrt([3, 1])
    assert effective_rank(two) == pytest.approx(4 / 3**0.75)


def test_blocks_hold_their_coordinates_variance_and_class_share():
    # Coordinates 1 and 2 are the class alone, 3 and 4 differ within each class alone.
    labels = np.array([0, 0, 1, 1])
    vectors = np.array([[0, 0, -1, 1], [0, 0, 1, -1], [6, 2, -1, 1], [6, 2, 1, -1]], dtype=np.float32)
    found = blocks(vectors, labels, [2, 4])
    assert found.variance.tolist() == pytest.approx([(9 + 1) / 2 / 3, 1 / 3])
    assert found.between.tolist() == pytest.approx([1, 0])
    assert found.rank.tolist() == pytest.approx([1, 1])
    assert found.prefix_rank[0] == pytest.approx(1)
    assert found.prefix_rank[1] == pytest.approx(np.exp(-(10 / 12 * np.log(10 / 12) + 2 / 12 * np.log(2 / 12))))


def test_blocks_without_variance_are_zero_and_not_nan():
    found = blocks(np.ones((4, 4)), np.zeros(4, dtype=np.int64), [2, 4])
    assert not np.concatenate(found[1:]).any()


@pytest.mark.parametrize("dims", [[4, 2], [2, 2], [2, 9], [0, 2], []])
def test_impossible_blocks_are_refused(dims):
    with pytest.raises(UserError, match="ascending, each 1 to the width, 8"):
        blocks(np.ones((4, 8)), np.zeros(4, dtype=np.int64), dims)


def test_spread_rows_go_from_first_to_last():
    assert spread_rows(10, 4).tolist() == [0, 3, 6, 9]
    assert spread_rows(3, 10).tolist() == [0, 1, 2]


def test_cosines_are_those_of_unit_prefixes():
    # Within a class prefixes of 1 point the same way, whole vectors do not.
    vectors = np.array([[1, 0], [1, 1], [-1, 0], [-2, 2]], dtype=np.float32)
    found = cosines(vectors, np.array([0, 0, 1, 1]), [1, 2], num_pairs=50)
    assert found[1][0] == pytest.approx(1) and found[2][0] == pytest.approx(np.sqrt(0.5))
    assert set(np.round(found[1][1], 5)) == {-1, 1}


def test_a_map_keeps_far_groups_apart_and_is_the_same_twice():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 15)
    vectors = np.eye(2)[labels] * 5 + rng.normal(scale=0.1, size=(30, 2))
    first, second = (maps(vectors, [2])[2] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    distances = np.linalg.norm(first[:, None] - first[None], axis=2) + 1e9 * np.eye(30)
    assert (labels[distances.argmin(axis=1)] == labels).all()
    with pytest.raises(UserError, match="10 or more images"):
        maps(vectors[:9], [2])
