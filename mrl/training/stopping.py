"""How a run ends early: by a signal, at the end of a step, or for want of GPU memory."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import torch

from mrl.config import Config
from mrl.errors import UserError


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


@contextlib.contextmanager
def gpu_memory_advice(config: Config, world_size: int) -> Iterator[None]:
    """Within it a GPU that runs out of memory ends the run with a sentence on what to change.

    Raises:
        UserError: A GPU ran out of memory.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        data, steps = config.data, config.train.accumulation_steps
        raise UserError(
            f"a GPU ran out of memory ({str(error).split('. ')[0]}) on {data.batch_size // world_size // steps} images "
            f"at a time; raise --train.accumulation_steps, now {steps}, with which a run also goes on from its last "
            f"checkpoint (--run.resume auto), or lower --data.batch_size, now {data.batch_size}, or --data.train_px, "
            f"now {data.train_px}"
        ) from error
