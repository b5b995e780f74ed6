"""What a run tells while it runs: metrics.jsonl, a progress line, and W&B."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mrl.errors import UserError
from mrl.files import write_text
from mrl.progress import progress


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
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
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
            write_text(id_path, secrets.token_hex(4))
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
