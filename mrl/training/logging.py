"""Losses and correct answers per prefix, summed as they come and divided once.

What a run tells while it runs: metrics.jsonl, a progress line, and W&B.

How a run ends early: by a signal, at the end of a step, or for want of GPU memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mrl.config import Config
from mrl.distributed import Process, all_reduce_sum
from mrl.errors import UserError
from mrl.progress import progress
from mrl.rundir import atomic_write_text


class MetricAccumulator:
    """Running sums per prefix over the images that this process has seen.

    ``values`` is ``(3, G)`` float64 on ``device``: summed losses, correct answers, images. Nothing
    is read back from the device before `means` is called.
    """

    def __init__(self, dims: Sequence[int], device: torch.device):
        self.dims = tuple(dims)
        self.values = torch.zeros(3, len(self.dims), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Count one batch: logits ``(G, B, C)``, labels ``(B,)``, mean losses ``(G,)``."""
        correct = (logits.argmax(-1) == labels).sum(1)
        count = torch.full_like(correct, len(labels))
        self.values += torch.stack([losses.double() * len(labels), correct.double(), count.double()])

    def means(self, loss_key: str, top_1_key: str) -> dict[str, float]:
        """``{loss_key/dim: mean loss, top_1_key/dim: share correct}`` over the images of all processes."""
        losses, correct, count = all_reduce_sum(self.values).tolist()
        row = {f"{loss_key}/{dim}": losses[g] / count[g] for g, dim in enumerate(self.dims)}
        return row | {f"{top_1_key}/{dim}": correct[g] / count[g] for g, dim in enumerate(self.dims)}


class FiniteCheck:
    """Remembers on the device when the loss of a prefix was first not finite, so that no step waits for the answer."""

    def __init__(self, dims: Sequence[int], process: Process):
        self.dims = tuple(dims)
        self.process = process
        self.first_bad = torch.full((len(self.dims),), -1, device=process.device)

    @torch.no_grad()
    def add(self, losses: Tensor, step: int) -> None:
        """Look at the losses ``(G,)`` of one step."""
        self.first_bad = torch.where((self.first_bad < 0) & ~losses.isfinite(), step, self.first_bad)

    def refuse_non_finite(self) -> None:
        """Nothing, as long as all losses of all processes were finite.

        Raises:
            UserError: One was not; the message names the step and the prefixes.
        """
        table = self.first_bad.new_zeros(self.process.world_size, len(self.dims))
        table[self.process.rank] = self.first_bad + 1  # 0 is good, step + 1 is bad
        table = all_reduce_sum(table)
        if not table.any():
            return
        step = int(table[table > 0].min()) - 1
        bad = [dim for g, dim in enumerate(self.dims) if (table[:, g] == step + 1).any()]
        raise UserError(
            f"the loss at step {step} is not finite for prefix sizes {bad}; what was saved before is kept. "
            "Lower --optim.lr or clip gradients with --optim.clip_norm 1; fp16 overflows where bf16 does not"
        )


class Tracker:
    """Writes rows to metrics.jsonl and W&B and shows a progress line; does nothing on other processes than the main.

    A row is a flat dict with at least ``step``; per-prefix values have keys such as ``loss/8``.
    Rows later than ``start_step``, left by a run that was killed after its last checkpoint, are dropped.

    Raises:
        UserError: W&B is asked for but not installed, or it cannot start.
    """

    def __init__(self, directory: Path, is_main: bool, start_step: int, total_steps: int, batch_size: int):
        self.path = directory / "metrics.jsonl"
        self.is_main = is_main
        self.batch_size = batch_size
        self.exit_code = 0
        self.wandb_run: Any = None
        if not is_main:
            return
        self.rows_before = rows = [row for row in _lines(self.path) if row["step"] <= start_step]
        atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = self.path.open("a")
        self.bar = progress(total=total_steps * batch_size, initial=start_step * batch_size, unit="image", delay=0)

    def start_wandb(self, mode: str, project: str, entity: str | None, name: str, config: dict[str, Any]) -> None:
        """Begin the W&B run, or go on with the one that this run directory began."""
        if mode == "disabled" or not self.is_main:
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb.mode needs W&B: pip install wandb, or give --wandb.mode disabled") from error
        id_path = self.path.with_name("wandb_id")
        if not id_path.exists():
            atomic_write_text(id_path, secrets.token_hex(4))
        try:
            self.wandb_run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                project=project,
                entity=entity,
                name=name,
                id=id_path.read_text(),
                resume="allow",
                dir=str(self.path.parent),
                config=config,
            )
        except wandb.errors.Error as error:
            raise UserError(f"W&B could not start ({error}); --wandb.mode offline needs no login") from error
        # Steps go backwards when a run resumes before its last logged row, which W&B's own step forbids.
        self.wandb_run.define_metric("*", step_metric="step")

    def validated(self, step: int) -> bool:
        """Whether a run that goes on from ``step`` has its validation row already; on the main process."""
        return any(row["step"] == step and any(key.startswith("val_loss/") for key in row) for row in self.rows_before)

    def log(self, row: dict[str, float], status: str | None) -> None:
        """Keep one row, and show ``status`` in the progress line if there is one."""
        if not self.is_main:
            return
        self.file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            self.wandb_run.log(row)
        if status is not None:
            self.bar.set_description_str(status, refresh=False)

    def advance(self) -> None:
        """Move the progress line on by one step."""
        if self.is_main:
            self.bar.update(self.batch_size)

    def say(self, message: str) -> None:
        """Print a line without breaking the progress line."""
        if self.is_main:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_main:
            return
        self.bar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=self.exit_code if kind is None else 1)


def _plain(value: float) -> float | None:
    # JSON has no NaN: a row that holds one must still be a row that others can read.
    return value if isinstance(value, int) or math.isfinite(value) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run that was killed while writing it
            break
    return rows


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
