"""How a run ends early: by a signal, at the end of a step, or for want of GPU memory."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from mrl.config import Config


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that stays empty until SIGINT or SIGTERM comes, and then holds it; a second SIGINT interrupts at once."""
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def memory_advice(config: Config, world_size: int, error: BaseException) -> str:
    """One sentence on what to change after a GPU ran out of memory, with ``error`` as torch's word on it."""
    data, steps = config.data, config.train.accumulation_steps
    return (
        f"a GPU ran out of memory ({str(error).split('. ')[0]}) on {data.batch_size // world_size // steps} images "
        f"at a time; raise --train.accumulation_steps, now {steps}, which may change when a run goes on with "
        f"--run.resume auto (a checkpoint that was saved is kept), or lower --data.batch_size, now {data.batch_size}, "
        f"or --data.train_px, now {data.train_px}"
    )
