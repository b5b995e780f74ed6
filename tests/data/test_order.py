import numpy as np
import pytest

from mrl.data.transforms import CROP_STREAM, ORDER_STREAM, counter_hash, epoch_order, eval_indices, train_indices
from mrl.errors import UserError


def splitmix64(state):
    """The published generator, in Python's own integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_one_key_hashes_as_splitmix64_does():
    # First output of the reference implementation for seed 1234567.
    assert int(counter_hash(1234567)[0]) == 6457827717110365317


def test_keys_are_folded_in_one_after_the_other():
    expected = splitmix64((splitmix64((splitmix64(3) + 2**40) % 2**64) + 9) % 2**64)
    assert int(counter_hash(3, 2**40, np.array([4, 9]))[1]) == expected


@pytest.mark.parametrize("num_rows", [1, 2, 1000])
def test_an_epochs_order_is_a_permutation(num_rows):
    order = epoch_order(num_rows, seed=1, epoch=2)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(num_rows))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    order = epoch_order(1000, 1, 2)
    np.random.default_rng().random(10)
    assert np.array_equal(order, epoch_order(1000, 1, 2))
    for other in (epoch_order(1000, 1, 3), epoch_order(1000, 2, 2), epoch_order(1000, 2, 1)):
        # Two unrelated permutations agree in one place on average.
        assert (order == other).sum() < 10


def test_orders_of_all_epochs_together_are_even():
    # Chi-square of where row 0 lands, in 10 bins: 9 degrees of freedom, 99.9 % below 27.9.
    places = [int(np.flatnonzero(epoch_order(50, 0, epoch) == 0)[0]) // 5 for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


def test_order_and_crops_draw_from_separate_streams():
    rows = np.arange(2000)
    first, second = (counter_hash(stream, 0, 0, rows).astype(float) for stream in (ORDER_STREAM, CROP_STREAM))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 2)])
def test_all_processes_together_take_the_global_batches_of_one(world_size, accumulation_steps):
    batch_size, num_rows = 24, 100
    order = epoch_order(num_rows, 7, 1)
    shares = [
        train_indices(num_rows, batch_size, 7, 1, rank, world_size, accumulation_steps) for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {4 * accumulation_steps}
    for step in range(4):
        together = [
            row
            for share in shares
            for micro_batch in share[step * accumulation_steps : (step + 1) * accumulation_steps]
            for row in micro_batch
        ]
        assert together == order[step * batch_size : (step + 1) * batch_size].tolist()


def test_the_incomplete_last_batch_is_left_out():
    rows = train_indices(10, 4, seed=0, epoch=0)
    assert [len(batch) for batch in rows] == [4, 4]
    assert len(set(np.concatenate(rows))) == 8


@pytest.mark.parametrize("start_step", [0, 1, 3, 4])
def test_starting_in_mid_epoch_gives_the_tail(start_step):
    whole = train_indices(100, 24, 7, 1, rank=1, world_size=2, accumulation_steps=3)
    tail = train_indices(100, 24, 7, 1, rank=1, world_size=2, accumulation_steps=3, start_step=start_step)
    assert len(tail) == len(whole) - 3 * start_step
    assert all(np.array_equal(a, b) for a, b in zip(tail, whole[3 * start_step :], strict=True))


def test_a_batch_that_cannot_be_cut_evenly_names_all_numbers():
    with pytest.raises(UserError, match=r"data.batch_size is 100; .* 3 processes x 2 accumulation steps = 6$"):
        train_indices(1000, 100, 0, 0, world_size=3, accumulation_steps=2)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(UserError, match=r"data.batch_size is 64; allowed: at most the 63 training images"):
        train_indices(63, 64, 0, 0)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 5, 200])
def test_evaluation_counts_every_row_once_where_the_world_size_does_not_divide(num_rows, world_size, batch_size):
    shares = [eval_indices(num_rows, batch_size, rank, world_size) for rank in range(world_size)]
    batches = [batch for share in shares for batch in share]
    assert np.concatenate(batches).tolist() == list(range(num_rows))
    assert all(0 < len(batch) <= batch_size and batch.dtype == np.int64 for batch in batches)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
