import numpy as np
import pytest
import torch

from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.studies import classification as module
from mrl.studies.classification import classification, predict

SOURCE = Source("digits", "some_run", 3, 32, 28, False)
DIMS = (4, 8, 12)


def values(rows):
    return {(row.metric, row.dim): row.value for row in rows}


@pytest.fixture(params=[False, True], ids=["separate", "tied"])
def case(request):
    """A head with its classifiers, and embeddings of 101 images and of their mirror images."""
    head = NestedLinear(DIMS, 9, request.param)
    vectors, mirrored = np.random.default_rng(0).standard_normal((2, 101, 16)).astype(np.float32)
    vectors[:, 12:] = np.nan  # fault 21: coordinates past the size change nothing
    return head, head.weights_and_biases(), vectors, mirrored


@pytest.fixture(params=[7, 101, 4096])
def batch_size(request, monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", request.param)


def one_image_at_a_time(vectors, labels, weight, bias, k):
    correct = 0
    for vector, label in zip(vectors, labels, strict=True):
        logits = weight @ vector[: weight.shape[1]] + bias
        correct += label in sorted(range(len(logits)), key=lambda c: (-logits[c], c))[:k]
    return correct / len(vectors)


def test_fault_21_accuracies_equal_a_loop_over_images_that_reads_the_prefix_alone(case, batch_size):
    _, classifiers, vectors, _ = case
    labels = np.random.default_rng(1).integers(9, size=101)
    rows = classification(vectors, labels, classifiers, SOURCE, "MRL")
    found = values(rows)
    assert list(found) == [(metric, dim) for dim in DIMS for metric in ("top_1", "top_5")]
    for dim, (weight, bias) in zip(DIMS, classifiers, strict=True):
        arrays = weight.detach().double().numpy(), bias.detach().double().numpy()
        for metric, k in (("top_1", 1), ("top_5", 5)):
            assert found[metric, dim] == one_image_at_a_time(vectors.astype(np.float64), labels, *arrays, k)
    assert {(row.study, row.method, row.n, row.run) for row in rows} == {("classification", "MRL", 101, "some_run")}


def test_predictions_are_those_of_the_head_and_the_logits_of_both_flips_are_added(case, batch_size):
    head, classifiers, vectors, mirrored = case
    with torch.no_grad():
        one, other = head(torch.from_numpy(vectors)), head(torch.from_numpy(mirrored))
    for logits, found in (
        (one, predict(vectors, classifiers)),
        (one + other, predict(vectors, classifiers, mirrored)),  # a sum, not a mean
    ):
        np.testing.assert_array_equal(found.classes, logits.argmax(2))
        np.testing.assert_allclose(found.confidence, logits.softmax(2).max(2).values, rtol=1e-5)


@pytest.mark.parametrize(("num_classes", "metrics"), [(5, {"top_1"}), (6, {"top_1", "top_5"})])
def test_five_classes_have_no_top_5(num_classes, metrics):
    classifier = (torch.eye(num_classes, 4), torch.zeros(num_classes))
    rows = classification(np.ones((2, 4), np.float32), np.array([0, 1]), [classifier], SOURCE, "FF")
    assert {row.metric for row in rows} == metrics


def test_of_equal_logits_the_lower_class_wins_and_confidence_is_at_most_1():
    equal = [(torch.zeros(6, 4), torch.zeros(6))]
    found = values(classification(np.ones((6, 4), np.float32), np.arange(6), equal, SOURCE, "FF"))
    assert found == {("top_1", 4): 1 / 6, ("top_5", 4): 5 / 6}
    assert predict(np.ones((2, 4), np.float32), equal).classes.tolist() == [[0, 0]]
    sure = predict(np.ones((1, 4), np.float32), [(torch.eye(3, 4) * 1e4, torch.tensor([0.0, 1e4, 0.0]))])
    assert sure.confidence.tolist() == [[1.0]]


def test_fault_1_labels_beyond_65536_are_classes_of_their_own():
    labels = np.array([2048, 2049, 65_536, 65_537, 69_999])
    weight = torch.zeros(70_000, 5)
    weight[torch.from_numpy(labels), torch.arange(5)] = 1
    for truth, accuracy in ((labels, 1), (labels[[1, 0, 3, 2, 4]], 0.2)):
        rows = classification(np.eye(5, dtype=np.float32), truth, [(weight, torch.zeros(70_000))], SOURCE, "FF")
        assert values(rows)["top_1", 5] == accuracy
