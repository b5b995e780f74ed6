import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mrl.distributed import Process
from mrl.errors import UserError
from mrl.rundir import checkpoint_path, load_checkpoint, open_run, record_start, save_checkpoint

CONFIG = "run: {name: a, resume: never}\noptim: {lr: 0.1}\n"


def test_what_is_saved_is_loaded(tmp_path):
    open_run(tmp_path / "a", "never", CONFIG)
    assert load_checkpoint(tmp_path / "a") is None
    save_checkpoint(tmp_path / "a", {"step": 3, "model": {"w": torch.arange(4.0)}})
    state = load_checkpoint(tmp_path / "a")
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["model"]["w"], torch.arange(4.0))


def test_an_existing_run_is_never_overwritten_by_accident(tmp_path):
    open_run(tmp_path / "a", "never", CONFIG)
    with pytest.raises(UserError, match=r"already holds a run.*--run\.resume auto"):
        open_run(tmp_path / "a", "never", CONFIG)


def test_a_model_without_a_checkpoint_is_not_trained_over(tmp_path):
    open_run(tmp_path / "a", "auto", CONFIG)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weeks of work")
    with pytest.raises(UserError, match="holds a trained model but no checkpoint"):
        open_run(tmp_path / "a", "auto", CONFIG)


def test_going_on_with_other_settings_names_them(tmp_path):
    open_run(tmp_path / "a", "auto", CONFIG)
    save_checkpoint(tmp_path / "a", {"step": 3})
    open_run(tmp_path / "a", "auto", CONFIG.replace("never", "auto"))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.1, now 0\.2"):
        open_run(tmp_path / "a", "auto", CONFIG.replace("0.1", "0.2"))


def test_how_a_run_is_computed_may_change_and_what_is_computed_may_not(tmp_path):
    open_run(tmp_path / "a", "auto", CONFIG)
    save_checkpoint(tmp_path / "a", {"step": 3})
    free = "train: {profile_steps: 5, gradient_precision: bf16, accumulation_steps: 2}\n"
    open_run(tmp_path / "a", "auto", CONFIG + free)
    with pytest.raises(UserError, match=r"train\.sync_batchnorm was False, now True"):
        open_run(tmp_path / "a", "auto", CONFIG + "train: {sync_batchnorm: true}\n")


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    open_run(tmp_path / "a", "auto", CONFIG)
    save_checkpoint(tmp_path / "a", {"step": 3})
    newer = CONFIG.replace("0.1}", "0.1, layer_decay: 1.0}")
    open_run(tmp_path / "a", "auto", newer)
    with pytest.raises(UserError, match=r"optim\.layer_decay was 1\.0, now 0\.5"):
        open_run(tmp_path / "a", "auto", newer.replace("1.0", "0.5"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    open_run(tmp_path, "never", CONFIG)
    save_checkpoint(tmp_path, {"step": 3, "model": torch.randn(1000)})
    whole = checkpoint_path(tmp_path).read_bytes()
    checkpoint_path(tmp_path).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"last\.pt is cut short"):
        load_checkpoint(tmp_path)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    open_run(tmp_path, "never", CONFIG)
    torch.save({"state_dict": {}}, checkpoint_path(tmp_path))
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path)
    torch.save(torch.nn.Linear(1, 1), checkpoint_path(tmp_path))  # code inside: not executed
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    open_run(tmp_path, "never", CONFIG)
    save_checkpoint(tmp_path, {"step": 3})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(tmp_path, {"step": 4})
    monkeypatch.undo()
    state = load_checkpoint(tmp_path)
    assert state is not None and state["step"] == 3
    assert os.listdir(tmp_path / "checkpoints") == ["last.pt"]


def test_kill_9_while_saving_leaves_a_loadable_checkpoint(tmp_path):
    program = (
        "import sys, torch; from pathlib import Path; from mrl.rundir import *\n"
        "d = Path(sys.argv[1]); open_run(d, 'never', 'run: {name: a}')\n"
        "for step in range(10**9): save_checkpoint(d, {'step': step, 'model': torch.full((300_000,), float(step))})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a")])
    deadline = time.monotonic() + 60
    while not checkpoint_path(tmp_path / "a").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    state = load_checkpoint(tmp_path / "a")
    assert state is not None and state["step"] > 0
    assert (state["model"] == state["step"]).all()


def test_a_start_on_other_processes_says_what_changes(tmp_path):
    said = []
    open_run(tmp_path, "never", CONFIG)
    for step, world_size, micro_batch_size in ((0, 1, 8), (1, 1, 8), (2, 2, 8), (3, 4, 4)):
        record_start(tmp_path, Process(0, world_size, torch.device("cpu")), micro_batch_size, step, said.append)
    assert said == [
        "resumed on 2 processes (1 before): same batches and learning rate",
        "resumed on 4 processes (2 before): same batches and learning rate, but BatchNorm "
        "sees 4 images at a time (8 before)",
    ]
    starts = json.loads((tmp_path / "provenance.json").read_text())
    assert [(start["start_step"], start["world_size"]) for start in starts] == [(0, 1), (1, 1), (2, 2), (3, 4)]
