"""Where the time of a training step goes: a trace of a few steps, and a summary of five lines."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule

from mrl.distributed import Process

SKIPPED_STEPS = 4  # a first step starts workers, compiles and tries out kernels; the profiler needs one to warm up, too
PHASES = ("data wait", "forward", "backward", "optimizer")
# As gloo's operations are called on the CPU, and NCCL's kernels on a GPU.
ALL_REDUCE = {
    DeviceType.CPU: re.compile(r"gloo:all_?reduce"),
    DeviceType.CUDA: re.compile(r"nccl(Dev)?Kernel_AllReduce"),
}


class StepProfiler:
    """Profiles ``num_steps`` steps of the main process, after the first few; costs nothing when that is 0.

    The loop says at which `phase` of a step it is, and when a `step` is done. After the last step to
    profile, or at the end if that comes sooner, ``trace.json.gz`` is written to ``directory`` and a
    summary goes to ``say``. Times are those of the device: on a GPU "data wait" is how long it stood
    idle for its next batch or prepared it, whatever the host did meanwhile.
    """

    def __init__(self, num_steps: int, directory: Path, process: Process, say: Callable[[str], None]):
        self._path = directory / "trace.json.gz"
        self._device = process.device
        self._say = say
        self._marks: list[tuple[str | None, Any]] = []  # a phase, and when it began; None ends a step
        self._range: record_function | None = None
        self._summarized = False
        self._profile: profile | None = None
        if num_steps > 0 and process.is_main:
            gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *gpu],
                schedule=schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=num_steps, repeat=1),
                on_trace_ready=self._summarize,
            )

    def phase(self, name: str) -> None:
        """From here on the loop is in phase ``name`` of a step, one of `PHASES`."""
        if self._profile is None:
            return
        self._mark(name)
        self._range = record_function(name)  # the trace shows it
        self._range.__enter__()

    def step(self) -> None:
        """A step is done."""
        if self._profile is None:
            return
        self._mark(None)
        self._profile.step()
        if self._summarized:
            self._profile = None

    def __enter__(self) -> StepProfiler:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        self._end_range()
        if kind is not None:  # a step that failed has no times, and its GPU perhaps no answers
            self._summarized = True
            self._marks.clear()
        self._profile.stop()
        if not self._summarized:
            self._say(f"train.profile_steps: the run ended within the {SKIPPED_STEPS} steps before those to profile")

    def _mark(self, name: str | None) -> None:
        self._end_range()
        if self._profile is not None and self._profile.current_action in (
            ProfilerAction.RECORD,
            ProfilerAction.RECORD_AND_SAVE,
        ):
            self._marks.append((name, self._now()))

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _summarize(self, finished: profile) -> None:
        num_steps = sum(name is None for name, _ in self._marks)
        if num_steps == 0:
            return
        self._summarized = True
        finished.export_chrome_trace(str(self._path))
        seconds = dict.fromkeys(PHASES, 0.0)
        for (name, start), (_, end) in itertools.pairwise(self._marks):
            if name is not None:
                seconds[name] += self._seconds_between(start, end) / num_steps
        all_reduce = all_reduce_seconds(finished.events() or (), self._device) / num_steps
        self._say(summary(seconds, all_reduce, num_steps, self._path))

    def _seconds_between(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


def all_reduce_seconds(events: Iterable[Any], device: torch.device) -> float:
    """Seconds that the all-reduces among a profiler's ``events`` took together, waits for other processes included."""
    where = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    times = (e.time_range.elapsed_us() for e in events if e.device_type == where and ALL_REDUCE[where].match(e.name))
    return sum(times) / 1e6


def summary(seconds: dict[str, float], all_reduce: float, num_steps: int, path: Path) -> str:
    """Five lines below a title: milliseconds per step and share of it, for each phase and for the all-reduce."""
    total = sum(seconds.values())
    lines = [f"{name:10} {1000 * value:9.2f} ms {value / total:5.0%}" for name, value in seconds.items()]
    during = ", most of it during the backward pass" if all_reduce > 0 else ""
    lines.append(f"all-reduce {1000 * all_reduce:9.2f} ms {all_reduce / total:5.0%}{during}")
    title = (
        f"profile: a step took {1000 * total:.2f} ms, mean of {num_steps}; trace: {path}, for https://ui.perfetto.dev"
    )
    return "\n  ".join([title, *lines])
