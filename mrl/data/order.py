"""Which images make up each batch: pure functions of seed, epoch and image number.

Nothing here keeps a state, so a run that was stopped in mid-epoch goes on with the batches it would
have had, and any number of processes sees the same global batches.
"""

from __future__ import annotations

import numpy as np

from mrl.errors import UserError

# Separate streams of random numbers: were they one, an image's place in the epoch would tell its crop.
ORDER_STREAM, CROP_STREAM, AUGMENT_STREAM = 0, 1, 2


def counter_hash(*keys: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits (uint64) for every combination of ``keys`` (whole numbers >= 0, broadcast together).

    Splitmix64's output function, applied once per key. Unlike a generator's stream it has no state,
    and unlike numpy's generators it will never change between versions.
    """
    bits = np.zeros(1, dtype=np.uint64)
    for key in keys:
        bits = bits + np.asarray(key, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all rows in an epoch, ``(N,)`` int64: a permutation that depends on nothing else."""
    return np.argsort(counter_hash(ORDER_STREAM, seed, epoch, np.arange(num_rows)), kind="stable")


def train_rows(
    num_rows: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    start_step: int = 0,
) -> list[np.ndarray]:
    """The rows of each micro-batch that process ``rank`` takes in an epoch, in turn; int64.

    Step s works on the global batch ``order[s * batch_size : (s + 1) * batch_size]``. Each process
    takes a contiguous share of it and cuts that into ``accumulation_steps`` consecutive
    micro-batches. The last, incomplete global batch is left out.

    Args:
        num_rows: Training images.
        batch_size: Images per step, over all processes and micro-batches together.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        rank: This process, counted from 0.
        world_size: Number of processes.
        accumulation_steps: Micro-batches per step.
        start_step: Steps of this epoch that are already done.

    Raises:
        UserError: The global batch cannot be cut evenly, or there are fewer images than one batch.
    """
    shares = world_size * accumulation_steps
    if batch_size % shares:
        raise UserError(
            f"data.batch_size is {batch_size}; allowed: a multiple of "
            f"{world_size} processes x {accumulation_steps} accumulation steps = {shares}"
        )
    if num_rows < batch_size:
        raise UserError(f"data.batch_size is {batch_size}; allowed: at most the {num_rows} training images")
    num_steps = num_rows // batch_size
    order = epoch_order(num_rows, seed, epoch)[: num_steps * batch_size]
    own = order.reshape(num_steps, world_size, accumulation_steps, -1)[start_step:, rank]
    return [rows for step in own for rows in step]


def eval_rows(num_rows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """The rows of each batch that process ``rank`` evaluates, int64, in dataset order.

    The shares of all processes hold every row exactly once, whatever the numbers: some process
    may have one row fewer than another, or none, but none is repeated to even them out.
    """
    first, end = (share * num_rows // world_size for share in (rank, rank + 1))
    return [np.arange(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]
