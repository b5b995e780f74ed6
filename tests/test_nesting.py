import itertools

import pytest
import torch

from mrl.errors import UserError
from mrl.matryoshka import check_nesting_list, default_nesting_list, prefix, unit_prefix


def test_default_sizes_are_the_papers():
    assert default_nesting_list(2048) == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert default_nesting_list(768) == (12, 24, 48, 96, 192, 384, 768)


@pytest.mark.parametrize("width", [1, 7, 8, 100, 320, 512, 1000, 1280])
def test_default_sizes_are_possible_at_any_width(width):
    dims = default_nesting_list(width)
    assert check_nesting_list(dims, width) == dims
    assert dims[-1] == width
    assert all(large == 2 * small for small, large in itertools.pairwise(dims))


@pytest.mark.parametrize(
    ("nesting_list", "reason"),
    [
        ([], "empty"),
        ([0, 8], "0"),
        ([-8], "-8"),
        ([8, 16.0], "16.0"),
        ([True], "True"),
        ([16, 8], r"ascending, e\.g\. \[8, 16\]"),
        ([8, 8], "ascending"),
        ([8, 64], "only 32"),
    ],
)
def test_impossible_sizes_are_refused_with_the_reason(nesting_list, reason):
    with pytest.raises(UserError, match=reason):
        check_nesting_list(nesting_list, width=32)


def test_a_list_without_the_full_width_warns_but_one_fixed_size_does_not(recwarn):
    check_nesting_list([8], width=32)
    assert not recwarn
    with pytest.warns(UserWarning, match="leaves coordinates 16 to 31"):
        check_nesting_list([8, 16], width=32)


def test_fault_19_a_unit_prefix_is_cut_first_and_normalised_after():
    z = torch.randn(5, 32)
    for dim in (1, 8, 32):
        unit = unit_prefix(z, dim)
        assert torch.allclose(unit.norm(dim=1), torch.ones(5), atol=1e-6)
        assert torch.allclose(unit, z[:, :dim] / z[:, :dim].norm(dim=1, keepdim=True), atol=1e-6)
    assert not torch.allclose(unit_prefix(z, 8), unit_prefix(z, 32)[:, :8])


def test_fault_25_norms_are_taken_in_float32():
    z = torch.full((1, 8), 300.0, dtype=torch.float16)  # the sum of squares is past what float16 holds
    unit = unit_prefix(z, 8)
    assert unit.dtype == torch.float32
    assert torch.allclose(unit, torch.full((1, 8), 8**-0.5))


@pytest.mark.parametrize("dim", [0, -1, 33])
def test_a_size_outside_the_embedding_is_refused(dim):
    with pytest.raises(UserError, match="1 to 32"):
        prefix(torch.zeros(2, 32), dim)
