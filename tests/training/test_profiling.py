import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from mrl.distributed import Process
from mrl.training.profiling import PHASES, SKIPPED_STEPS, StepProfiler, all_reduce_seconds

ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """Run steps of two micro-batches under a clock that stands still but for the time that phases take."""
    now, said = [0.0], []
    monkeypatch.setattr(StepProfiler, "_now", lambda self: now[0])

    def run(num_profiled, steps, process=ALONE):
        with StepProfiler(num_profiled, tmp_path, process, said.append) as profiler:
            for step in range(steps):
                slow = 100 if step < SKIPPED_STEPS or step >= SKIPPED_STEPS + num_profiled else 1
                for _ in range(2):
                    for phase, seconds in (("data wait", 1.5), ("forward", 0.5), ("backward", 2.5)):
                        profiler.phase(phase)
                        torch.ones(2).sum()
                        now[0] += slow * seconds
                profiler.phase("optimizer")
                now[0] += slow * 1.0
                profiler.step()
                now[0] += 1000  # logging, saving, validation
        return said

    run.said = said
    return run


def test_the_summary_is_the_mean_of_the_profiled_steps_alone(loop, tmp_path):
    (text,) = loop(3, SKIPPED_STEPS + 5)
    title, *lines = text.splitlines()
    assert title.startswith("profile: a step took 10000.00 ms, mean of 3; trace: ")
    assert [line.split()[-3:] for line in lines] == [
        ["3000.00", "ms", "30%"],
        ["1000.00", "ms", "10%"],
        ["5000.00", "ms", "50%"],
        ["1000.00", "ms", "10%"],
        ["0.00", "ms", "0%"],
    ]
    assert [line[2:12].strip() for line in lines] == [*PHASES, "all-reduce"]
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [ranges.count(phase) for phase in PHASES] == [6, 6, 6, 3]
    assert any(event["name"] == "aten::sum" for event in events)


def test_a_run_that_ends_early_is_told_of_with_the_steps_there_were(loop):
    (text,) = loop(50, SKIPPED_STEPS + 2)
    assert "mean of 2;" in text


def test_a_run_too_short_says_so(loop, tmp_path):
    (text,) = loop(3, SKIPPED_STEPS)
    assert "ended within" in text
    assert list(tmp_path.iterdir()) == []


def test_off_and_on_other_processes_nothing_is_written_or_said(loop, tmp_path):
    assert loop(0, 9) == []
    assert loop(3, 9, Process(rank=1, world_size=2, device=torch.device("cpu"))) == []
    assert list(tmp_path.iterdir()) == []


def test_a_failing_step_is_not_hidden_by_its_profile(tmp_path):
    said = []
    with pytest.raises(RuntimeError, match="step failed"), StepProfiler(3, tmp_path, ALONE, said.append) as profiler:
        for _ in range(SKIPPED_STEPS + 1):
            profiler.phase("forward")
            profiler.step()
        profiler.phase("forward")
        raise RuntimeError("step failed")
    assert said == [] and list(tmp_path.iterdir()) == []


def test_all_reduces_are_gloos_calls_on_the_cpu_and_nccls_kernels_on_a_gpu():
    def event(name, where, microseconds):
        elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=where, time_range=elapsed)

    events = [
        event("gloo:all_reduce", DeviceType.CPU, 2_000_000),
        event("gloo:broadcast", DeviceType.CPU, 64_000_000),
        event("nccl:all_reduce", DeviceType.CUDA, 32_000_000),  # the same all-reduce, as a range around its kernel
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", DeviceType.CUDA, 1_000_000),
        event("ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*)", DeviceType.CUDA, 500_000),
        event("ncclDevKernel_Broadcast_RING_LL(ncclDevComm*)", DeviceType.CUDA, 16_000_000),
    ]
    assert all_reduce_seconds(events, torch.device("cpu")) == 2
    assert all_reduce_seconds(events, torch.device("cuda", 0)) == 1.5
