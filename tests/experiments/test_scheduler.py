"""The scheduler with a stand-in for train.py that keeps its contract: run directory, resuming, stopping on SIGTERM."""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import scheduler
from experiments.grids import PlannedRun
from experiments.run_state import read_state
from experiments.scheduler import Scheduler
from mrl.config import Config, OptimConfig, RunConfig, TrainConfig

EPOCHS = 2
STAND_IN = """
import json, os, pathlib, signal, sys, time
directory, behavior = pathlib.Path(sys.argv[1]), sys.argv[2]
metrics = directory / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
(directory / "pid").write_text(str(os.getpid()))
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with (directory / "starts").open("a") as file:
    file.write(f"{done} {time.monotonic()}\\n")
if behavior == "fails":
    sys.exit("out of memory")
for epoch in range(done + 1, 3):
    with metrics.open("a") as file:
        row = {"epoch": epoch, "val_loss/8": 1.0, "top_1/8": 0.25, "top_1/64": 0.5}
        file.write(json.dumps(row) + "\\n")
    while behavior == "waits" and not stop:
        time.sleep(0.01)
    if stop:
        sys.exit(143)
(directory / "model.safetensors").touch()
with (directory / "starts").open("a") as file:
    file.write(f"end {time.monotonic()}\\n")
time.sleep(0.2 if behavior == "slow" else 0)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(scheduler, "visible_gpus", list)


def planned(tmp_path, name, behavior="trains", needs=None):
    run = RunConfig(name=name, dir=str(tmp_path))
    config = Config(run=run, optim=OptimConfig(warmup_epochs=0), train=TrainConfig(epochs=EPOCHS))
    return PlannedRun(name, "group", (str(tmp_path / name), behavior), config, needs)


def train(runs, jobs=1):
    return Scheduler(runs, jobs, (sys.executable, "-c", STAND_IN)).train_all()


def when_there(path, act):
    """Do ``act`` from another thread once ``path`` exists."""

    def wait():
        deadline = time.monotonic() + 30
        while not path.exists() or not path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def starts(tmp_path, name):
    return [line.split()[0] for line in (tmp_path / name / "starts").read_text().splitlines()]


def test_finished_runs_are_passed_over_and_others_go_on(tmp_path):
    runs = [planned(tmp_path, "one"), planned(tmp_path, "two")]
    train(runs[:1])
    (tmp_path / "two").mkdir()
    first = {"epoch": 1, "val_loss/8": 1.0, "top_1/8": 0.1}
    (tmp_path / "two" / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    outcome = train(runs)
    assert (outcome.finished, outcome.failed, outcome.stopped_by) == (["one", "two"], {}, 0)
    assert starts(tmp_path, "one") == ["0", "end"]  # once, in the first call
    assert starts(tmp_path, "two") == ["1", "end"]  # from its first epoch on
    state = read_state(runs[1])
    assert (state.word, state.epochs_done, state.top_1) == ("finished", 2, {8: 0.25, 64: 0.5})
    attempt = json.loads((tmp_path / "one" / "attempts.jsonl").read_text())
    assert attempt["exit"] == 0 and attempt["seconds"] == pytest.approx(read_state(runs[0]).seconds)


def test_a_failed_run_takes_only_those_with_it_that_need_it(tmp_path, capsys):
    runs = [planned(tmp_path, "bad", "fails"), planned(tmp_path, "good"), planned(tmp_path, "after", needs="bad")]
    outcome = train(runs)
    assert outcome.finished == ["good"]
    assert outcome.failed == {
        "bad": "train.py ended with exit status 1; its last line: out of memory",
        "after": "needs bad, which failed",
    }
    assert "bad FAILED" in capsys.readouterr().out
    assert not (tmp_path / "after").exists()


def test_a_run_waits_for_the_one_it_needs(tmp_path):
    train([planned(tmp_path, "first", "slow"), planned(tmp_path, "second", needs="first")], jobs=2)
    ended, began = (
        float((tmp_path / name / "starts").read_text().splitlines()[line].split()[1])
        for name, line in (("first", -1), ("second", 0))
    )
    assert ended < began


def test_several_run_at_once_and_no_more_than_asked(tmp_path):
    # Both wait until they are stopped, so the stop comes when both are there; the third never starts.
    runs = [planned(tmp_path, name, "waits") for name in ("one", "two", "three")]
    one, two = (tmp_path / name / "metrics.jsonl" for name in ("one", "two"))
    stop = when_there(one, lambda: when_there(two, lambda: os.kill(os.getpid(), signal.SIGINT)).join())
    outcome = train(runs, jobs=2)
    stop.join()
    assert outcome.stopped_by == signal.SIGINT and not outcome.finished and not outcome.failed
    assert [read_state(run).word for run in runs] == ["started", "started", "not started"]


def test_a_stopped_grid_goes_on_where_it_was(tmp_path):
    stop = when_there(tmp_path / "one" / "metrics.jsonl", lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = train([planned(tmp_path, "one", "waits"), planned(tmp_path, "two")])
    stop.join()
    assert outcome.stopped_by == signal.SIGTERM and not (tmp_path / "two").exists()
    assert train([planned(tmp_path, "one"), planned(tmp_path, "two")]).finished == ["one", "two"]
    assert starts(tmp_path, "one") == ["0", "1", "end"]
    assert len((tmp_path / "one" / "attempts.jsonl").read_text().splitlines()) == 2


def test_a_killed_child_is_reported_and_the_rest_goes_on(tmp_path):
    kill = when_there(
        tmp_path / "one" / "metrics.jsonl",
        lambda: os.kill(int((tmp_path / "one" / "pid").read_text()), signal.SIGKILL),
    )
    outcome = train([planned(tmp_path, "one", "waits"), planned(tmp_path, "two")])
    kill.join()
    assert outcome.finished == ["two"]
    assert outcome.failed["one"].startswith("killed by SIGKILL")
    assert train([planned(tmp_path, "one")]).finished == ["one"]


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    log = (tmp_path / "one" / "train.log").open("ab")
    fcntl.flock(log, fcntl.LOCK_EX)
    let_go = when_there(tmp_path / "two" / "starts", log.close)
    outcome = train([planned(tmp_path, "one"), planned(tmp_path, "two")])
    let_go.join()
    assert outcome.finished == ["two", "one"]
    assert "one is being trained by another process" in capsys.readouterr().out


def test_an_orphan_still_holds_its_run(tmp_path):
    # The lock is the child's: whoever started it may be gone.
    Path(tmp_path / "one").mkdir()
    with (tmp_path / "one" / "train.log").open("ab") as log:
        assert scheduler.lock(log)
        child = scheduler.subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, stdout=log)
    with (tmp_path / "one" / "train.log").open("ab") as again:
        assert not scheduler.lock(again)
        child.communicate(b"\n")
        assert scheduler.lock(again)


def test_gpus_are_shared_out_by_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "visible_gpus", lambda: ["3", "5"])
    schedule = Scheduler([], jobs=3)
    assert [schedule._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["3", "5", "3"]
