"""Training runs as child processes: some at a time, each at most once, none lost when one of them dies.

A child writes to train.log in its run directory and holds a lock on that file for as long as it lives, so a run never
trains twice at once: not from two schedulers, nor beside a child that a killed scheduler has left behind. Such a run
is waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from experiments.grids import PlannedRun
from experiments.run_state import ATTEMPTS, LOG, accuracies, duration, read_state
from mrl.progress import progress
from mrl.training.logging import stop_signals

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN = (sys.executable, str(REPOSITORY / "train.py"))
POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0


@dataclass
class Outcome:
    """What became of the runs.

    Attributes:
        finished: Names of runs that are finished now, also of those that were before.
        failed: ``{name: reason}``.
        stopped_by: Number of the signal that ended the work early; 0 if none did.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped_by: int = 0


@dataclass
class Child:
    """A run in training."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    slot: int
    started_at: float
    started_utc: str


class Scheduler:
    """Trains runs, ``jobs`` at a time, in their order; a run whose ``needs`` has failed is not started.

    Args:
        runs: What to train; finished ones are passed over.
        jobs: How many at a time, spread over the GPUs that are visible; on the CPU they share the cores.
        command: What takes the words of a run; train.py.
    """

    def __init__(self, runs: Sequence[PlannedRun], jobs: int, command: Sequence[str] = TRAIN):
        self.runs, self.jobs, self.command = runs, jobs, tuple(command)
        self.states = {run.name: read_state(run) for run in runs}
        self.outcome = Outcome([run.name for run in runs if self.states[run.name].word == "finished"])
        self.waiting = [run for run in runs if run.name not in self.outcome.finished]
        self.children: list[Child] = []
        self.elsewhere: set[str] = set()
        self.gpus = visible_gpus()

    def train_all(self) -> Outcome:
        """Train until every run is finished or has failed.

        Ctrl-C and SIGTERM let the children save and end, for a later call to go on from; a second Ctrl-C kills them.
        """
        epochs = sum(run.config.train.epochs for run in self.runs)
        with stop_signals() as came, progress(total=epochs, initial=self._epochs_done(), unit="epoch", delay=0) as bar:
            looked_at = 0.0
            try:
                while self.children or (self.waiting and not came):
                    if came and not self.outcome.stopped_by:
                        self.outcome.stopped_by = came[0]
                        tqdm.write(f"{len(self.children)} runs save and stop; a second Ctrl-C kills them")
                        for child in self.children:
                            child.process.terminate()
                    if not came:
                        self._start_what_can()
                    if self._collect_what_ended() or time.monotonic() - looked_at > LOOK_SECONDS:
                        self._show(bar)
                        looked_at = time.monotonic()
                    time.sleep(POLL_SECONDS)
                self.outcome.stopped_by = came[0] if came else 0
            finally:
                for child in self.children:  # only where an error or a second Ctrl-C ended the loop
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.process.pid, signal.SIGKILL)
                    child.process.wait()
            self._show(bar)
        return self.outcome

    def _start_what_can(self) -> None:
        names = {run.name for run in self.runs}
        for run in list(self.waiting):
            if len(self.children) == self.jobs:
                return
            if run.needs in self.outcome.failed:
                self._fail(run, f"needs {run.needs}, which failed")
            elif run.needs not in names or run.needs in self.outcome.finished:
                self._start(run)

    def _start(self, run: PlannedRun) -> None:
        run.directory.mkdir(parents=True, exist_ok=True)
        with (run.directory / LOG).open("ab") as log:
            if not lock(log):
                if run.name not in self.elsewhere:
                    tqdm.write(f"{run.name} is being trained by another process; waiting for it")
                self.elsewhere.add(run.name)
                return
            self.waiting.remove(run)
            self.states[run.name] = read_state(run)
            if self.states[run.name].word == "finished":  # by that other process
                self.outcome.finished.append(run.name)
                return
            slot = min(set(range(self.jobs)) - {child.slot for child in self.children})
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            process = subprocess.Popen(
                [*self.command, *run.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                start_new_session=True,  # a Ctrl-C in the terminal is for this process to pass on
            )
        self.children.append(Child(run, process, slot, time.monotonic(), now))
        going_on = "goes on" if self.states[run.name].word == "started" else "starts"
        tqdm.write(f"{run.name} {going_on}; log: {run.directory / LOG}")

    def _environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        elif self.jobs > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            environment["OMP_NUM_THREADS"] = str(max(1, cores // self.jobs))
        return environment

    def _collect_what_ended(self) -> bool:
        ended = [child for child in self.children if child.process.poll() is not None]
        for child in ended:
            self.children.remove(child)
            run, code, seconds = child.run, child.process.returncode, time.monotonic() - child.started_at
            attempt = {"time_utc": child.started_utc, "seconds": round(seconds, 1), "exit": code, "jobs": self.jobs}
            with (run.directory / ATTEMPTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(attempt) + "\n")
            self.states[run.name] = state = read_state(run)
            if code == 0 and state.word == "finished":
                self.outcome.finished.append(run.name)
                count = f"{len(self.outcome.finished)} of {len(self.runs)}"
                tqdm.write(f"{run.name} finished after {duration(state.seconds)} ({count}): top-1 {accuracies(state)}")
            elif self.outcome.stopped_by:
                tqdm.write(f"{run.name} stopped in epoch {state.epochs_done:.2f} of {run.config.train.epochs}")
            else:
                self._fail(run, f"{_ending(code)}; its last line: {_last_line(run.directory / LOG)}")
        return bool(ended)

    def _fail(self, run: PlannedRun, reason: str) -> None:
        if run in self.waiting:
            self.waiting.remove(run)
        self.outcome.failed[run.name] = reason
        tqdm.write(f"{run.name} FAILED: {reason}")

    def _epochs_done(self) -> float:
        return sum(
            min(state.epochs_done, run.config.train.epochs)
            for run, state in ((run, self.states[run.name]) for run in self.runs)
        )

    def _show(self, bar: tqdm) -> None:
        for child in self.children:
            self.states[child.run.name] = read_state(child.run)
        now = ", ".join(
            f"{child.run.name} {self.states[child.run.name].epochs_done / child.run.config.train.epochs:.0%}"
            for child in self.children
        )
        done = f"{len(self.outcome.finished)}/{len(self.runs)} runs"
        bar.set_description_str(done + (f", {len(self.outcome.failed)} failed" if self.outcome.failed else ""))
        bar.set_postfix_str(now, refresh=False)
        bar.n = self._epochs_done()
        bar.refresh()


def lock(file: IO[bytes]) -> bool:
    """Whether ``file`` is now locked for whoever holds it open, the child that inherits it included."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES wants them; empty without a GPU."""
    if not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def _ending(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"train.py ended with exit status {code}" + (" before the last epoch" if code == 0 else "")


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "none")
