import itertools
import math

import pytest

from mrl.training.optim import lr_at, px_at


def test_the_papers_schedule_at_its_knots():
    steps_per_epoch, epochs, peak = 1251, 40, 0.425
    total, warmup = epochs * steps_per_epoch, 2 * steps_per_epoch
    lr = [lr_at(step, total, warmup, peak) for step in range(total)]
    assert lr[0] == pytest.approx(peak / warmup)
    assert lr[warmup - 1] == lr[warmup] == max(lr) == peak
    assert lr[(warmup + total) // 2] == pytest.approx(peak / 2, rel=1e-3)
    assert 0 < lr[-1] == pytest.approx(peak / (total - warmup))
    rises = [later - earlier for earlier, later in itertools.pairwise(lr)]
    assert all(rise > 0 for rise in rises[: warmup - 1])
    assert all(rise < 0 for rise in rises[warmup:])


def test_cosine_is_half_a_wave_from_peak_to_zero():
    lr = [lr_at(step, 100, 0, 2.0, "cosine") for step in range(100)]
    assert lr == pytest.approx([1 + math.cos(math.pi * step / 100) for step in range(100)])


def test_without_warm_up_the_first_step_has_the_peak():
    assert lr_at(0, 10, 0, 0.3) == 0.3


def test_resolution_of_the_papers_recipe_by_epoch():
    assert [px_at(epoch, [(0, 160), (32, 192)]) for epoch in range(40)] == [160] * 32 + [192] * 8
    assert px_at(7, 64) == 64
