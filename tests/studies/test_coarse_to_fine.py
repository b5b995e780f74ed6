import numpy as np
import pytest

from mrl.errors import UserError
from mrl.studies.geometry import shown_sizes, telling_queries, undecided_images


@pytest.mark.parametrize(
    ("dims", "shown"),
    [
        ([8, 16, 32, 64, 128, 256, 512, 1024, 2048], [8, 32, 128, 2048]),
        ([8, 16, 32, 64, 128, 256, 512], [8, 32, 128, 512]),
        ([8, 16], [8, 16]),
        ([8], [8]),
    ],
)
def test_sizes_for_a_picture(dims, shown):
    assert shown_sizes(dims) == shown


def test_queries_that_gain_most_come_first_one_of_each_class():
    database_labels = np.array([0, 1])
    small = np.array([[1, 1], [1, 0], [0, 0], [1, 1]])
    full = np.array([[0, 0], [0, 0], [1, 0], [0, 0]])
    # Right neighbors, small and full: query 0 0 -> 2, 1 1 -> 2, 2 (class 1) 0 -> 1, 3 0 -> 2.
    found = {8: (small, small), 32: (full, full)}
    labels = np.array([0, 0, 1, 0])
    assert telling_queries(found, labels, database_labels, 2).tolist() == [0, 2]
    assert telling_queries(found, labels, database_labels, 4).tolist() == [0, 2, 3, 1]
    with pytest.raises(UserError, match="allowed are 1 to 4"):
        telling_queries(found, labels, database_labels, 5)


def test_undecided_images_change_most_and_end_up_right():
    labels = np.array([0, 0, 0, 0])
    predictions = np.array([[0, 1, 1, 2], [0, 0, 2, 1], [0, 0, 0, 2]])
    assert undecided_images(predictions, labels, 4).tolist() == [2, 1, 0, 3]
    with pytest.raises(UserError, match="allowed are 1 to 4"):
        undecided_images(predictions, labels, 0)
