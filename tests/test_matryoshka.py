import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mrl import MatryoshkaLoss, NestedLinear, nested_cross_entropy, prefix, unit_prefix
from mrl.errors import UserError
from mrl.matryoshka import check_nesting_list, check_weights, default_nesting_list, self_distillation

DIMS = [3, 5, 8]
both_heads = pytest.mark.parametrize("tied", [False, True])


@pytest.mark.parametrize("width", [7, 8, 320, 2048])
def test_default_dims_halve_any_width(width):
    dims = default_nesting_list(width)
    assert check_nesting_list(dims, width) == dims and dims[-1] == width
    assert all(large == 2 * small for small, large in itertools.pairwise(dims))


@pytest.mark.parametrize(
    ("nesting_list", "reason"),
    [
        ([], r"\[\]; allowed are one or more positive integers"),
        ([0, 8], "positive integers"),
        ([8, 16.0], r"\[8, 16\.0\]"),
        ([True], "True"),
        ([16, 8], r"ascending, e\.g\. \[8, 16\]"),
        ([8, 8], "ascending"),
        ([8, 64], "only 32"),
    ],
)
def test_an_invalid_nesting_list_is_refused_with_the_reason(nesting_list, reason):
    with pytest.raises(UserError, match=reason):
        check_nesting_list(nesting_list, width=32)


def test_a_list_that_ends_below_the_width_warns_but_a_single_dim_does_not(recwarn):
    check_nesting_list([8], width=32)
    assert not recwarn
    with pytest.warns(UserWarning, match="leaves coordinates 16 to 31"):
        check_nesting_list([8, 16], width=32)


def test_fault_19_a_unit_prefix_is_cut_first_and_normalized_after():
    z = torch.randn(5, 32)
    for dim in (1, 8, 32):
        unit = unit_prefix(z, dim)
        assert torch.allclose(unit, z[:, :dim] / z[:, :dim].norm(dim=1, keepdim=True), atol=1e-6)
    assert not torch.allclose(unit_prefix(z, 8), unit_prefix(z, 32)[:, :8])


def test_fault_25_norms_are_taken_in_float32():
    unit = unit_prefix(torch.full((1, 8), 300.0, dtype=torch.float16), 8)  # the squared norm overflows float16
    assert unit.dtype == torch.float32
    assert torch.allclose(unit, torch.full((1, 8), 8**-0.5))


@both_heads
def test_logits_equal_written_out_classifiers(tied):
    head, z = NestedLinear(DIMS, num_classes=4, tied=tied), torch.randn(6, 8)
    logits, state = head(z), head.state_dict()
    assert logits.shape == (3, 6, 4)
    for g, dim in enumerate(DIMS):
        weight, bias = state[f"classifiers.{0 if tied else g}.weight"], state[f"classifiers.{0 if tied else g}.bias"]
        for b, c in itertools.product(range(6), range(4)):
            assert logits[g, b, c].item() == pytest.approx(
                float((weight[c, :dim] * z[b, :dim]).sum() + bias[c]), abs=1e-5
            )


@both_heads
def test_fault_21_coordinates_at_or_beyond_dim_change_nothing_and_get_no_gradient(tied):
    head = NestedLinear(DIMS, num_classes=4, tied=tied)
    for g, dim in enumerate(DIMS):
        z = torch.randn(6, 8, requires_grad=True)
        other = torch.cat([z[:, :dim], torch.randn(6, 8 - dim) * 100], dim=1)
        assert torch.equal(head(z)[g], head(other)[g])
        (gradient,) = torch.autograd.grad(head(z)[g].square().sum(), z)
        assert torch.equal(gradient[:, dim:], torch.zeros(6, 8 - dim))
        assert gradient[:, :dim].abs().min() > 0


def test_parameters_are_counted_once_and_the_shared_bias_is_included():
    count = {tied: sum(p.numel() for p in NestedLinear(DIMS, 4, tied).parameters()) for tied in (False, True)}
    assert count == {False: (3 + 5 + 8) * 4 + 3 * 4, True: 8 * 4 + 4}


def test_a_scaled_head_starts_as_the_shared_one_and_divides_gradients_by_the_prefixes_that_use_a_column():
    shared, scaled = (NestedLinear([2, 3, 5], 4, tied=True, scaled=is_scaled) for is_scaled in (False, True))
    scaled.load_state_dict(shared.state_dict() | {"log_scales": torch.zeros(3)})
    with pytest.raises(UserError, match="allowed: scaled with tied=True"):
        NestedLinear([2, 3, 5], 4, scaled=True)
    z = torch.randn(6, 7)
    for head in (shared, scaled):
        (head(z) ** 2).sum().backward()
    assert torch.equal(scaled(z), shared(z))
    weights = [head.classifiers[0].weight.grad for head in (shared, scaled)]
    torch.testing.assert_close(weights[0] / torch.tensor([3.0, 3, 2, 1, 1]), weights[1])
    twice = copy.deepcopy(copy.deepcopy(scaled)), copy.copy(copy.deepcopy(scaled))
    for head in (*twice, copy.deepcopy(copy.deepcopy(scaled).requires_grad_(False)).requires_grad_(True)):
        head.zero_grad()
        (head(z) ** 2).sum().backward()
        assert torch.equal(head.classifiers[0].weight.grad, weights[1])
    assert torch.equal(*(head.classifiers[0].bias.grad for head in (shared, scaled)))
    with torch.no_grad():
        scaled.log_scales.copy_(torch.tensor([0.5, 1, 2]).log())
    torch.testing.assert_close(scaled(z), shared(z) * torch.tensor([0.5, 1, 2])[:, None, None])


def test_a_single_dim_is_the_fixed_feature_model_tied_or_not():
    plain, tied = NestedLinear([5], 4, tied=False), NestedLinear([5], 4, tied=True)
    tied.load_state_dict(plain.state_dict())
    z = torch.randn(6, 8)
    assert torch.equal(plain(z), tied(z))
    assert torch.equal(plain(z), plain(z[:, :5]))


def test_an_embedding_narrower_than_the_head_is_refused():
    with pytest.raises(UserError, match="cannot take 8 dims of an embedding of width 5; allowed: 1 to 5"):
        NestedLinear(DIMS, 4)(torch.zeros(2, 5))
    with pytest.raises(UserError, match="cannot take 0 dims"):
        prefix(torch.zeros(2, 5), 0)


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
    one_hot = F.one_hot(labels, 4).float()
    assert torch.allclose(nested_cross_entropy(logits, one_hot, label_smoothing), losses)


def test_self_distillation_is_the_divergence_from_the_largest_prefix_which_it_does_not_move():
    logits = torch.randn(3, 6, 4, requires_grad=True)
    losses = self_distillation(logits)
    for g in range(3):
        pairs = zip(logits[2].softmax(-1).flatten().tolist(), logits[g].softmax(-1).flatten().tolist(), strict=True)
        expected = sum(teacher * math.log(teacher / student) for teacher, student in pairs) / 6
        assert losses[g].item() == pytest.approx(expected, abs=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient[2].abs().max() == 0 < gradient[:2].abs().min()
    rounded = logits.bfloat16()
    assert torch.equal(self_distillation(rounded), self_distillation(rounded.float())), "computed in float32"


def triplet(a, p, n, margin):
    return F.relu((a - p).norm(dim=1) - (a - n).norm(dim=1) + margin).mean()


def test_matryoshka_loss_sums_over_prefixes_of_every_embedding_and_cuts_no_keyword():
    a, p, n = torch.randn(3, 5, 8).unbind()
    loss = MatryoshkaLoss(triplet, [2, 4, 8], weights=[2.0, 1.0, 0.5])
    expected = sum(c * triplet(a[:, :m], p[:, :m], n[:, :m], 0.3) for c, m in [(2.0, 2), (1.0, 4), (0.5, 8)])
    assert torch.allclose(loss(a, p, n, margin=0.3), torch.as_tensor(expected))
    target = torch.randn(5, 8)  # soft labels
    assert MatryoshkaLoss(lambda z, target: (target.shape[1] + 0 * z).mean(), [2, 8])(a, target=target) == 16


@pytest.mark.parametrize(
    "arguments",
    [(), (torch.zeros(5, 4),), (torch.zeros(5, 8), torch.arange(5)), (torch.zeros(5, 8), torch.zeros(5, 9))],
    ids=["none", "too narrow", "labels", "soft labels"],
)
def test_positional_arguments_that_are_not_embeddings_are_refused(arguments):
    with pytest.raises(UserError, match="pass labels and everything else by keyword"):
        MatryoshkaLoss(F.cross_entropy, [2, 8])(*arguments)


def test_fault_03_weights_follow_the_embeddings():
    loss = MatryoshkaLoss(lambda z: z.sum(), [1, 2], weights=[3.0, 5.0])
    assert "weights" in dict(loss.named_buffers()) and "weights" not in loss.state_dict()
    result = loss(torch.ones(1, 2, device="meta", dtype=torch.float64))
    assert (result.device.type, result.dtype) == ("meta", torch.float64)
    assert loss(torch.ones(1, 2)).item() == 3 * 1 + 5 * 2


@pytest.mark.parametrize(
    ("weights", "reason"),
    [([1.0], "1 loss weights"), ([1.0, -1.0], "0 or more"), ([0, 0], "not all 0"), ([1, float("nan")], "finite")],
)
def test_invalid_weights_are_refused(weights, reason):
    with pytest.raises(UserError, match=reason):
        check_weights(weights, [8, 16])
