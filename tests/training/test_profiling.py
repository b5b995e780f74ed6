import gzip
import json

import pytest
import torch
from torch.profiler import record_function

from mrl.distributed import Process
from mrl.training.profiling import SKIPPED_STEPS, step_profiler

ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))


def profile(directory, num_profiled, num_steps, process=ALONE):
    lines = []
    with step_profiler(num_profiled, directory, process, lines.append) as step:
        for _ in range(num_steps):
            with record_function("forward"):
                torch.ones(2).sum()
            step()
    return lines


@pytest.mark.parametrize(("num_steps", "num_seen"), [(SKIPPED_STEPS + 5, 3), (SKIPPED_STEPS + 2, 2)])
def test_the_steps_after_the_first_are_in_table_and_trace_as_far_as_the_run_gets(tmp_path, num_steps, num_seen):
    (text,) = profile(tmp_path, 3, num_steps)
    (line,) = [line for line in text.splitlines() if line.strip().startswith("forward")]
    assert int(line.split()[-1]) == num_seen
    assert f"trace: {tmp_path}/trace.json.gz" in text
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") in ("user_annotation", "cpu_op")]
    assert names.count("forward") == num_seen and "aten::sum" in names


def test_nothing_is_written_by_a_short_run_or_when_off_or_by_other_processes(tmp_path):
    (text,) = profile(tmp_path, 3, SKIPPED_STEPS - 2)
    assert "ended within its first" in text
    assert profile(tmp_path, 0, 9) == []
    assert profile(tmp_path, 3, 9, Process(rank=1, world_size=2, device=torch.device("cpu"))) == []
    assert list(tmp_path.iterdir()) == []
