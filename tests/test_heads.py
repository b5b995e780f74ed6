import pytest
import torch

from mrl import NestedLinear
from mrl.errors import UserError

DIMS = [3, 5, 8]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_written_out_classifiers(tied):
    head = NestedLinear(DIMS, num_classes=4, tied=tied)
    z = torch.randn(6, 8)
    logits = head(z)
    assert logits.shape == (3, 6, 4)
    state = dict(head.named_parameters())
    for g, dim in enumerate(DIMS):
        weight, bias = state[f"classifiers.{0 if tied else g}.weight"], state[f"classifiers.{0 if tied else g}.bias"]
        expected = torch.stack(
            [torch.stack([(weight[c, :dim] * z[b, :dim]).sum() + bias[c] for c in range(4)]) for b in range(6)]
        )
        assert torch.allclose(logits[g], expected, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_fault_21_coordinates_at_or_beyond_dim_change_nothing_and_get_no_gradient(tied):
    head = NestedLinear(DIMS, num_classes=4, tied=tied)
    for g, dim in enumerate(DIMS):
        z = torch.randn(6, 8, requires_grad=True)
        other = torch.cat([z[:, :dim], torch.randn(6, 8 - dim) * 100], dim=1)
        assert torch.equal(head(z)[g], head(other)[g])
        (gradient,) = torch.autograd.grad(head(z)[g].square().sum(), z)
        assert torch.equal(gradient[:, dim:], torch.zeros(6, 8 - dim))
        assert gradient[:, :dim].abs().min() > 0


def test_tied_sizes_equal_the_full_classifier_on_zero_padded_embeddings():
    head = NestedLinear(DIMS, num_classes=4, tied=True)
    z = torch.randn(6, 8)
    for g, dim in enumerate(DIMS):
        padded = torch.cat([z[:, :dim], torch.zeros(6, 8 - dim)], dim=1)
        assert torch.allclose(head(z)[g], head(padded)[-1], atol=1e-6)


def test_parameters_are_counted_once_and_shared_bias_included():
    count = {tied: sum(p.numel() for p in NestedLinear(DIMS, 4, tied).parameters()) for tied in (False, True)}
    assert count == {False: (3 + 5 + 8) * 4 + 3 * 4, True: 8 * 4 + 4}


def test_one_size_is_the_fixed_feature_model_tied_or_not():
    plain, tied = NestedLinear([5], 4, tied=False), NestedLinear([5], 4, tied=True)
    tied.load_state_dict(plain.state_dict())
    z = torch.randn(6, 8)
    assert torch.equal(plain(z), tied(z))
    assert torch.equal(plain(z), plain(z[:, :5]))


def test_the_first_sizes_of_a_tied_head_survive_saving_and_loading():
    head, other = NestedLinear(DIMS, 4, tied=True), NestedLinear(DIMS, 4, tied=True)
    other.load_state_dict(head.state_dict())
    z = torch.randn(2, 8)
    assert torch.equal(head(z), other(z))


def test_an_embedding_narrower_than_the_head_is_refused():
    with pytest.raises(UserError, match="cannot take 8 dims of an embedding of width 5"):
        NestedLinear(DIMS, 4)(torch.zeros(2, 5))
