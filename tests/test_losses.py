import pytest
import torch
import torch.nn.functional as F

from mrl import MatryoshkaLoss, nested_cross_entropy
from mrl.errors import UserError
from mrl.matryoshka import check_weights


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_nested_cross_entropy_equals_the_written_out_definition(label_smoothing):
    logits, labels = torch.randn(3, 6, 4), torch.randint(4, (6,))
    losses = nested_cross_entropy(logits, labels, label_smoothing)
    for g in range(3):
        expected = 0.0
        for b in range(6):
            log_p = (logits[g, b] - logits[g, b].exp().sum().log()).tolist()
            target = [label_smoothing / 4 + (1 - label_smoothing) * (c == labels[b]) for c in range(4)]
            expected -= sum(t * p for t, p in zip(target, log_p, strict=True)) / 6
        assert losses[g].item() == pytest.approx(float(expected), abs=1e-5)


def test_class_probabilities_as_targets_equal_labels_when_they_are_certain():
    logits, labels = torch.randn(3, 6, 4), torch.randint(4, (6,))
    certain = F.one_hot(labels, 4).float()
    assert torch.allclose(nested_cross_entropy(logits, certain, 0.1), nested_cross_entropy(logits, labels, 0.1))


def triplet(a, p, n, margin):
    return F.relu((a - p).norm(dim=1) - (a - n).norm(dim=1) + margin).mean()


def test_matryoshka_loss_sums_over_prefixes_of_every_embedding():
    a, p, n = torch.randn(3, 5, 8).unbind()
    loss = MatryoshkaLoss(triplet, [2, 4, 8], weights=[2.0, 1.0, 0.5])
    expected = sum(c * triplet(a[:, :m], p[:, :m], n[:, :m], 0.3) for c, m in [(2.0, 2), (1.0, 4), (0.5, 8)])
    assert torch.allclose(loss(a, p, n, 0.3), torch.as_tensor(expected))
    assert torch.allclose(loss(a, p, n, margin=0.3), torch.as_tensor(expected))


def test_matryoshka_loss_leaves_labels_and_keywords_alone():
    seen = []

    def record(z, labels, target):
        seen.append((z.shape, labels, target))
        return z.sum()

    z, labels, target = torch.randn(5, 8), torch.arange(5), torch.randn(5, 8)
    MatryoshkaLoss(record, [2, 8])(z, labels, target=target)
    assert [shape for shape, _, _ in seen] == [(5, 2), (5, 8)]
    assert all(got is labels and kept is target for _, got, kept in seen)


def test_matryoshka_loss_gradient_adds_up_over_the_prefixes_that_hold_a_coordinate():
    z = torch.zeros(1, 4, requires_grad=True)
    MatryoshkaLoss(torch.sum, [1, 2, 4])(z).backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[3.0, 2.0, 1.0, 1.0]]


def test_fault_03_weights_follow_the_embeddings():
    loss = MatryoshkaLoss(lambda z: z.sum(), [1, 2], weights=[3.0, 5.0])
    assert "weights" in dict(loss.named_buffers())
    assert "weights" not in loss.state_dict()
    result = loss(torch.ones(1, 2, device="meta", dtype=torch.float64))
    assert (result.device.type, result.dtype) == ("meta", torch.float64)
    assert loss(torch.ones(1, 2)).item() == 3 * 1 + 5 * 2


@pytest.mark.parametrize(
    ("weights", "reason"),
    [([1.0], "1 loss weights"), ([1.0, -1.0], "0 or more"), ([0, 0], "not all 0"), ([1, float("nan")], "finite")],
)
def test_impossible_weights_are_refused(weights, reason):
    with pytest.raises(UserError, match=reason):
        check_weights(weights, [8, 16])


def test_a_call_without_embedding_is_refused():
    with pytest.raises(UserError, match="needs an embedding first"):
        MatryoshkaLoss(torch.sum, [2, 8])(torch.zeros(5, 4))
