"""Run logging (running sums, metrics.jsonl, the progress bar, W&B), stop signals, and advice on failures."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mrl.config import Config, WandbConfig
from mrl.distributed import all_reduce_sum, out_of_memory
from mrl.errors import UserError
from mrl.progress import progress
from mrl.rundir import atomic_write_text, read_metrics

SECONDS_TO_WAIT = 10.0


class MetricAccumulator:
    """Running sums per prefix, kept on the device so that no step waits for them.

    ``values`` is ``(4, G)`` float64: losses, correct answers, images, and images of batches with a non-finite loss.
    """

    def __init__(self, dims: Sequence[int], device: torch.device):
        self.dims = tuple(dims)
        self.values = torch.zeros(4, len(self.dims), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Add a batch: logits ``(G, B, C)``, labels ``(B,)``, mean losses ``(G,)``."""
        correct = (logits.argmax(-1) == labels).double().mean(1)
        means = torch.stack([losses.double(), correct, torch.ones_like(correct), (~losses.isfinite()).double()])
        self.values += len(labels) * means

    def means(self, loss_key: str, top_1_key: str) -> dict[str, float]:
        """Return ``{loss_key/dim: mean loss, top_1_key/dim: share correct}`` over the images of all processes."""
        losses, correct, count, _ = all_reduce_sum(self.values).tolist()
        row = {f"{loss_key}/{dim}": losses[g] / count[g] for g, dim in enumerate(self.dims)}
        return row | {f"{top_1_key}/{dim}": correct[g] / count[g] for g, dim in enumerate(self.dims)}

    def check_finite(self, step: int, batch_size: int, weights: Iterable[Tensor] = ()) -> None:
        """Check the losses of all processes, and ``weights``, after ``step`` steps of ``batch_size`` images."""
        bad, what = all_reduce_sum(self.values)[3], ""
        if bad.any():
            first = step - math.ceil(bad.max() / batch_size)
            dims = [dim for dim, count in zip(self.dims, bad, strict=True) if count == bad.max()]
            what = f"the loss at step {first} is not finite for prefix sizes {dims}"
        elif any((~weight.isfinite()).any() for weight in weights):
            what = f"the weights after step {step} are not finite"
        if what:
            raise UserError(
                f"{what}; the last checkpoint is kept. Lower --optim.lr, or clip gradients with --optim.clip_norm 1, "
                "or use bf16 instead of fp16"
            )


class Tracker(contextlib.AbstractContextManager):
    """Writes rows to metrics.jsonl and W&B and shows a progress bar; does nothing on other processes than the main one.

    A row is a flat dict with at least ``step``; per-prefix values have keys such as ``loss/8``. Rows after
    ``start_step``, which a killed run wrote after its last checkpoint, are dropped.
    """

    def __init__(self, directory: Path, is_main: bool, start_step: int, total_steps: int, batch_size: int):
        self.path = directory / "metrics.jsonl"
        self.is_main = is_main
        self.batch_size = batch_size
        self.wandb_run: Any = None
        if is_main:
            self.rows_before = [row for row in read_metrics(directory) if row["step"] <= start_step]
            atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows_before))
            self.file = self.path.open("a")
            self.bar = progress(total=total_steps * batch_size, initial=start_step * batch_size, unit="image", delay=0)

    def start_wandb(self, settings: WandbConfig, name: str, config: dict[str, Any]) -> None:
        """Start the W&B run, or resume the one that this run directory started."""
        if settings.mode != "disabled" and self.is_main:
            self.wandb_run = start_wandb(self.path.parent, "--wandb.mode", name=name, config=config, **asdict(settings))
            self.wandb_run.define_metric("*", step_metric="step")

    def validated(self, step: int) -> bool:
        """Return on the main process whether the validation row of ``step`` was there at the start."""
        return any(row["step"] == step and any(key.startswith("val_loss/") for key in row) for row in self.rows_before)

    def log(self, row: dict[str, float], status: str | None = None) -> None:
        """Write one row, and show ``status`` in the progress bar."""
        if not self.is_main:
            return
        row_of_json = {key: value if math.isfinite(value) else None for key, value in row.items()}  # JSON has no NaN
        self.file.write(json.dumps(row_of_json) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            # W&B's own count begins again in a resumed run, and W&B drops rows of steps that it has passed.
            self.wandb_run.log(row, step=max(int(row["step"]), self.wandb_run.step))
        if status is not None:
            self.bar.set_description_str(status, refresh=False)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.is_main:
            self.bar.update(self.batch_size)

    def log_line(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_main:
            self.bar.close()
            self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=int(kind is not None))


def start_wandb(directory: Path, option: str, **settings: Any) -> Any:
    """Return the W&B run of a run directory (file wandb_id), resumed or new; errors name the ``option``."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"{option} needs W&B: pip install wandb, or give {option} disabled") from error
    id_path = directory / "wandb_id"
    if not id_path.exists():
        atomic_write_text(id_path, secrets.token_hex(4))
    try:
        return wandb.init(**settings, id=id_path.read_text(), resume="allow", dir=str(directory))
    except wandb.errors.Error as error:
        raise UserError(f"W&B could not start ({error}); {option} offline needs no login") from error


class StopSignals(contextlib.AbstractContextManager):
    """Receives SIGINT and SIGTERM; true after the first, whose number is ``number``.

    The training loop ends when it sees that. A second SIGINT raises KeyboardInterrupt at once.
    """

    number = 0
    _is_waiting = False

    def __enter__(self) -> StopSignals:
        handlers = {signal.SIGINT: self._stop, signal.SIGTERM: self._stop, signal.SIGALRM: self._end_the_wait}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.number > 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Raise KeyboardInterrupt(number) in what runs inside ten seconds after a signal, if it takes so long."""
        self._is_waiting = True
        signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_WAIT * bool(self))
        try:
            yield
        finally:
            self._is_waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_WAIT * self._is_waiting)

    def _end_the_wait(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(self.number)


@contextlib.contextmanager
def advice(config: Config, world_size: int) -> Iterator[None]:
    """Turn a full memory, and a failure to compile, into a UserError that tells what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason, train = str(error).strip().split("\n")[0], config.train
        if place := out_of_memory(error):
            images = config.data.batch_size // world_size // train.accumulation_steps
            raise UserError(
                f"{place} ran out of memory ({reason.split('. ')[0]}) on up to {images} images at a time; "
                f"raise --train.accumulation_steps, now {train.accumulation_steps}, which may change on resume, "
                f"or lower --data.batch_size, now {config.data.batch_size}, or "
                f"--data.train_px, now {config.data.train_px}"
            ) from error
        if train.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise UserError(f"torch.compile failed ({reason}); train without it: --train.compile false") from error
        raise
