import numpy as np
import pytest
import torch

from mrl.errors import UserError
from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.studies.classification import classification, true_ranks, truncations

SOURCE = Source("digits", "some_run", 3, 32, 28, False)


def values(rows):
    return {(row.metric, row.dim): row.value for row in rows}


def one_image_at_a_time(vectors, labels, weight, bias, k):
    correct = 0
    for vector, label in zip(vectors, labels, strict=True):
        logits = weight @ vector[: weight.shape[1]] + bias
        best = sorted(range(len(logits)), key=lambda c: (-logits[c], c))[:k]
        correct += label in best
    return correct / len(vectors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch_rows", [7, 101, 4096])
def test_equals_a_loop_over_images(tied, batch_rows):
    head = NestedLinear([4, 8, 12], 9, tied)
    vectors = np.random.default_rng(0).standard_normal((101, 16)).astype(np.float32)
    labels = np.random.default_rng(1).integers(9, size=101)
    classifiers = [head.weight_and_bias(g) for g in range(3)]
    rows = classification(vectors, labels, classifiers, SOURCE, "MRL", batch_rows=batch_rows)
    found = values(rows)
    assert list(found) == [(metric, dim) for dim in (4, 8, 12) for metric in ("top_1", "top_5")]
    for dim, (weight, bias) in zip((4, 8, 12), classifiers, strict=True):
        arrays = weight.detach().double().numpy(), bias.detach().double().numpy()
        for metric, k in (("top_1", 1), ("top_5", 5)):
            assert found[metric, dim] == one_image_at_a_time(vectors.astype(np.float64), labels, *arrays, k)
    assert {(row.study, row.method, row.n, row.run, row.seed, row.cost) for row in rows} == {
        ("classification", "MRL", 101, "some_run", 3, None)
    }


def test_worked_by_hand():
    # Two dims, three classes: at 1 dim class 0 wins where z > 0 and class 1 where z < 0; the second dim is class 2's.
    classifiers = [
        (torch.tensor([[1.0], [-1.0], [0.0]]), torch.zeros(3)),
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0]]), torch.zeros(3)),
    ]
    vectors = np.array([[2.0, 0.0], [-2.0, 0.0], [-2.0, 1.0], [1.0, -9.0]], dtype=np.float32)
    rows = classification(vectors, np.array([0, 1, 2, 1]), classifiers, SOURCE, "MRL")
    # 1 dim: right, right, wrong, wrong. 2 dims: right, right, right, wrong.
    assert values(rows) == {("top_1", 1): 0.5, ("top_1", 2): 0.75}


@pytest.mark.parametrize(("num_classes", "metrics"), [(5, {"top_1"}), (6, {"top_1", "top_5"})])
def test_top_5_says_nothing_of_five_classes(num_classes, metrics):
    rows = classification(
        np.ones((2, 4), np.float32),
        np.array([0, 1]),
        [(torch.eye(num_classes, 4), torch.zeros(num_classes))],
        SOURCE,
        "FF",
    )
    assert {row.metric for row in rows} == metrics


def test_among_equal_scores_the_lower_class_wins():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(4, 4)
    assert true_ranks(logits, torch.arange(4)).tolist() == [0, 1, 2, 3]


def test_truncation_is_the_wide_classifier_on_vectors_with_zeros_behind():
    head = NestedLinear([16], 10)
    vectors = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    labels = np.random.default_rng(1).integers(10, size=50)
    cut = truncations(*head.weight_and_bias(0), [2, 8, 16])
    rows = classification(vectors, labels, cut, SOURCE, "FF truncated")
    for dim in (2, 8, 16):
        zeroed = vectors.copy()
        zeroed[:, dim:] = 0
        predictions = head(torch.from_numpy(zeroed))[0].argmax(1).numpy()
        assert values(rows)["top_1", dim] == (predictions == labels).mean()


def test_coordinates_past_the_size_change_nothing():
    head = NestedLinear([4, 8], 10)
    classifiers = [head.weight_and_bias(g) for g in range(2)]
    vectors = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    labels = np.arange(50) % 10
    changed = vectors.copy()
    changed[:, 8:] = np.nan
    assert classification(vectors, labels, classifiers, SOURCE, "MRL") == classification(
        changed, labels, classifiers, SOURCE, "MRL"
    )


def test_fault_1_labels_beyond_65536_are_classes_of_their_own():
    labels = np.array([2048, 2049, 65_536, 65_537, 69_999])
    weight = torch.zeros(70_000, 5)
    weight[torch.from_numpy(labels), torch.arange(5)] = 1
    classifier = (weight, torch.zeros(70_000))
    rows = classification(np.eye(5, dtype=np.float32), labels, [classifier], SOURCE, "FF", batch_rows=2)
    assert values(rows)["top_1", 5] == 1
    rows = classification(np.eye(5, dtype=np.float32), labels[[1, 0, 3, 2, 4]], [classifier], SOURCE, "FF")
    assert values(rows)["top_1", 5] == 0.2


def test_refuses_labels_outside_the_classes_and_classifiers_that_are_not_finite():
    vectors, classifier = np.ones((2, 4), np.float32), (torch.ones(3, 4), torch.zeros(3))
    with pytest.raises(UserError, match=r"0 to 3.*0 to 2"):
        classification(vectors, np.array([0, 3]), [classifier], SOURCE, "FF")
    with pytest.raises(UserError, match="-1"):
        classification(vectors, np.array([0, -1]), [classifier], SOURCE, "FF")
    with pytest.raises(UserError, match=r"4 dims.*NaN"):
        classification(vectors, np.array([0, 1]), [(classifier[0] * torch.nan, classifier[1])], SOURCE, "FF")
    with pytest.raises(UserError, match="0 embeddings"):
        classification(vectors[:0], np.array([], dtype=np.int64), [classifier], SOURCE, "FF")
