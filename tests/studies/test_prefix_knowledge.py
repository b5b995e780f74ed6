import numpy as np
import pytest

from mrl.errors import UserError
from mrl.results import Source
from mrl.studies import hierarchy as prefix_knowledge
from mrl.studies.hierarchy import (
    Hierarchy,
    confusion_counts,
    group_classes,
    knowledge,
    nearest_classes,
    sizes_from_two,
    sizes_needed,
)

SOURCE = Source("digits", "a", 0, 32, 32, False)


def test_sizes_below_the_trained_ones_are_powers_of_two_from_two_on():
    assert sizes_from_two([8, 16]) == [2, 4, 8, 16]
    assert sizes_from_two([12, 24]) == [2, 4, 8, 12, 24]
    assert sizes_from_two([2, 4]) == [2, 4]


def test_nearest_classes_are_those_of_a_slow_search():
    rng = np.random.default_rng(0)
    queries, database = rng.normal(size=(20, 6)).astype(np.float32), rng.normal(size=(30, 6)).astype(np.float32)
    labels = rng.integers(0, 4, 30)
    found = nearest_classes(queries, database, labels, [2, 6])
    for g, dim in enumerate((2, 6)):
        for q, query in enumerate(queries[:, :dim]):
            cosines = [query @ row / np.linalg.norm(query) / np.linalg.norm(row) for row in database[:, :dim]]
            assert found[g, q] == labels[int(np.argmax(cosines))]


@pytest.mark.parametrize("batch_rows", [8192, 3])
def test_classes_that_point_the_same_way_are_one_group_whatever_their_length(monkeypatch, batch_rows):
    monkeypatch.setattr(prefix_knowledge, "BATCH_ROWS", batch_rows)
    angles = np.radians([0, 10, 90, 100, 200])
    labels = np.repeat(np.arange(5), 4)
    lengths = np.random.default_rng(0).uniform(1, 50, (20, 1))
    vectors = lengths * np.stack([np.cos(angles), np.sin(angles)], axis=1)[labels]
    groups = group_classes(vectors, labels, ["a", "b", "c", "d", "e"], 3)
    assert groups.names == ("a, b", "c, d", "e")
    assert groups.superclass_of.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("num_groups", [1, 6])
def test_an_impossible_number_of_groups_is_refused(num_groups):
    with pytest.raises(UserError, match="2 to the number of classes, 5"):
        group_classes(np.eye(5), np.arange(5), list("abcde"), num_groups)


def test_a_class_without_images_cannot_be_grouped():
    with pytest.raises(UserError, match="'c' has no image"):
        group_classes(np.eye(3), np.array([0, 1, 1]), list("abc"), 2)


def test_knowledge_of_classes_groups_and_random_groups():
    groups = Hierarchy(np.array([0, 0, 1, 1]), ("ab", "cd"))
    labels = np.array([0, 1, 2, 3])
    predictions = np.array([[1, 0, 3, 2], [0, 1, 2, 2]])
    rows = knowledge(predictions, labels, [2, 8], groups, SOURCE, "MRL", num_shuffles=3000)
    value = {(row.metric, row.dim): row.value for row in rows}
    assert (value["top_1", 2], value["top_1", 8]) == (0, 0.75)
    assert (value["superclass_top_1", 2], value["superclass_top_1", 8]) == (1, 1)
    # Of two random pairs of four classes, a wrong class is the partner of the right one in a third of all cases.
    assert value["shuffled_superclass_top_1", 2] == pytest.approx(1 / 3, abs=0.03)
    assert value["shuffled_superclass_top_1", 8] == pytest.approx(0.75 + 0.25 / 3, abs=0.01)


def test_confusions_are_counted_and_needed_sizes_hand_worked():
    labels = np.array([0, 0, 1, 1, 2])
    predictions = np.array([[1, 1, 1, 1, 2], [0, 1, 1, 1, 2], [0, 0, 1, 0, 2]])
    counts = confusion_counts(predictions, labels, 4)
    assert counts[1].tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert counts.sum(axis=(1, 2)).tolist() == [5, 5, 5]
    # Class 0 gets better up to 32; class 1 is best at 8 already; class 3 has no image.
    assert sizes_needed(counts, [8, 16, 32]).tolist() == [32, 8, 8, 0]
    # A dip on the way does not count as reached; half a class of two images is a tolerance of 0.5.
    dip = counts[[2, 0, 2]]
    assert sizes_needed(dip, [8, 16, 32])[0] == 32
    assert sizes_needed(counts, [8, 16, 32], tolerance=0.5)[0] == 16
