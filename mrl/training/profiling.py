"""A profile of a few training steps, by torch.profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from mrl.distributed import Process

SKIPPED_STEPS = 4  # the first steps start workers, compile and choose kernels; the last of them warms the profiler up


@contextlib.contextmanager
def step_profiler(
    num_steps: int, directory: Path, process: Process, log_line: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Profile ``num_steps`` steps of the main process after the first few; yield a function to call after each step.

    Then, or at the end if that comes sooner, write ``trace.json.gz`` to ``directory`` and log the profiler's table.
    """
    if num_steps == 0 or not process.is_main:
        yield lambda: None
        return
    path, on_gpu = directory / "trace.json.gz", process.device.type == "cuda"
    finished = []

    def finish(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        averages = profiler.key_averages()
        table = averages.table("device_time_total" if on_gpu else "cpu_time_total", row_limit=20)
        log_line(
            f"{table}\nprofile: up to {num_steps} steps after the first {SKIPPED_STEPS}; trace: {path}, for https://ui.perfetto.dev"
        )
        finished.append(path)

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    steps = schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=finish) as profiler:
        yield profiler.step
    if not finished:
        log_line(f"train.profile_steps: the run ended within its first {SKIPPED_STEPS} steps, which are not profiled")
