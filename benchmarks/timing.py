"""What the benchmarks share: contenders that take turns, and one JSON line per measurement."""

from __future__ import annotations

import functools
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch

from mrl.rundir import provenance


@dataclass
class Timed:
    """Seconds of each counted repeat, wall and CPU time (of all processes together), and the last answer."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    answer: Any = None


def take_turns(contenders: Mapping[str, Callable[[], Any]], repeats: int, inner: int = 1) -> dict[str, Timed]:
    """Call each contender ``inner`` times per repeat, after one repeat that does not count.

    A slow moment of the machine then affects all contenders, and none is always the first.
    """
    names, timed = list(contenders), {name: Timed() for name in contenders}
    for repeat in range(repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            started, cpu_started = time.perf_counter(), _cpu_seconds()
            for _ in range(inner):
                timed[name].answer = contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                timed[name].seconds.append((time.perf_counter() - started) / inner)
                timed[name].cpu_seconds.append((_cpu_seconds() - cpu_started) / inner)
    return timed


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def ratios(key: str, numerators: list[float], denominators: list[float]) -> dict[str, Any]:
    """Return entries for a JSON line: the median of the ratios of each repeat, and their range."""
    values = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return {key: round(statistics.median(values), 3), f"{key}_range": [round(min(values), 3), round(max(values), 3)]}


def rate(count: int, timed: Timed) -> float:
    """Return how many of ``count`` things were done per second, the median over repeats."""
    return round(count / statistics.median(timed.seconds), 1)


@functools.cache
def _machine() -> dict[str, Any]:
    about = provenance()
    return {key: about[key] for key in ("cpu", "gpus", "torch", "git_commit", "git_dirty")} | {"timm": timm.__version__}


def report(measurement: str, **values: Any) -> None:
    """Print one JSON line. "load" shows whether the machine was idle."""
    memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    now = {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1), "max_resident_gib": memory}
    print(json.dumps({"measurement": measurement} | values | now | _machine()), flush=True)
