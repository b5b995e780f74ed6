import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mrl import rundir
from mrl.errors import UserError
from mrl.rundir import (
    atomic_write,
    check_data,
    check_run,
    checkpoint_path,
    load_checkpoint,
    open_run,
    provenance,
    record_start,
    save_checkpoint,
)

CONFIG = "run: {name: a, resume: never}\noptim: {lr: 0.1}\n"
DEFAULTS = "optim: {lr: 0.4, layer_decay: 1.0}\ntrain: {sync_batchnorm: false, compile: false, accumulation_steps: 1}\n"


def resume(directory, config_yaml):
    check_run(directory, "auto", config_yaml, DEFAULTS)


def test_a_saved_checkpoint_loads(tmp_path):
    open_run(tmp_path / "a", CONFIG)
    assert load_checkpoint(tmp_path / "a") is None
    save_checkpoint(tmp_path / "a", {"step": 3, "model": {"w": torch.arange(4.0)}})
    state = load_checkpoint(tmp_path / "a")
    assert state["step"] == 3 and torch.equal(state["model"]["w"], torch.arange(4.0))


def test_an_existing_run_is_not_overwritten(tmp_path):
    check_run(tmp_path / "a", "never", CONFIG, DEFAULTS)
    assert not (tmp_path / "a").exists(), "a check writes nothing"
    open_run(tmp_path / "a", CONFIG)
    save_checkpoint(tmp_path / "a", {"step": 3})
    with pytest.raises(UserError, match=r"already holds a run.*--run\.resume auto"):
        check_run(tmp_path / "a", "never", CONFIG, DEFAULTS)
    checkpoint_path(tmp_path / "a").unlink()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weeks of work")
    with pytest.raises(UserError, match="already holds a run"):
        check_run(tmp_path / "a", "never", CONFIG, DEFAULTS)
    with pytest.raises(UserError, match="holds a trained model but no checkpoint"):
        resume(tmp_path / "a", CONFIG)
    (tmp_path / "b").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resume(tmp_path / "b", CONFIG)


def test_resuming_refuses_other_settings_but_not_another_way_to_compute_the_same(tmp_path):
    open_run(tmp_path, CONFIG)
    save_checkpoint(tmp_path, {"step": 3})
    resume(tmp_path, CONFIG.replace("never", "auto"))
    resume(tmp_path, CONFIG + "train: {compile: true, accumulation_steps: 2, sync_batchnorm: false}\n")
    with pytest.raises(UserError, match=r"\(optim\.lr was 0\.1, now 0\.2\)"):
        resume(tmp_path, CONFIG.replace("0.1", "0.2"))
    # A setting that is newer than the run had its default.
    with pytest.raises(UserError, match=r"train\.sync_batchnorm was False, now True"):
        resume(tmp_path, CONFIG + "train: {sync_batchnorm: true}\n")
    newer = CONFIG.replace("0.1}", "0.1, layer_decay: 1.0}")
    resume(tmp_path, newer)
    with pytest.raises(UserError, match=r"optim\.layer_decay was 1\.0, now 0\.5"):
        resume(tmp_path, newer.replace("1.0", "0.5"))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"no config\.yaml"):
        resume(tmp_path, CONFIG)


@pytest.mark.parametrize("how", ["never", "auto"])
def test_a_first_try_that_failed_before_its_first_checkpoint_is_no_obstacle(tmp_path, how):
    open_run(tmp_path / "a", CONFIG)
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 50}\n')
    (tmp_path / "a" / "wandb_id").write_text("1234")
    corrected = CONFIG.replace("0.1", "0.2")
    check_run(tmp_path / "a", how, corrected, DEFAULTS)
    open_run(tmp_path / "a", corrected)
    assert (tmp_path / "a" / "config.yaml").read_text() == corrected
    assert not (tmp_path / "a" / "metrics.jsonl").read_text() and not (tmp_path / "a" / "wandb_id").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "photo.jpg").write_text("")
    with pytest.raises(UserError, match="already holds"):
        check_run(tmp_path / "b", "never", CONFIG, DEFAULTS)


def test_a_run_that_another_process_trains_is_refused_until_that_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "SECONDS_OF_ORPHANS", 0.3)
    open_run(tmp_path, CONFIG)
    program = "import sys, time; from pathlib import Path; from mrl.rundir import hold\n"
    program += "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    for how in ("never", "auto"):
        with pytest.raises(UserError, match="another process is training in"):
            check_run(tmp_path, how, CONFIG, DEFAULTS)
    with pytest.raises(UserError, match="another process is training in"):
        open_run(tmp_path, CONFIG)
    child.kill()
    child.communicate()
    resume(tmp_path, CONFIG)


def test_training_longer_is_refused_with_the_command_that_does_it(tmp_path):
    config = CONFIG + "train: {epochs: 2}\n"
    open_run(tmp_path / "x", config)
    save_checkpoint(tmp_path / "x", {"step": 3})
    longer = config.replace("epochs: 2", "epochs: 3")
    with pytest.raises(UserError, match=r"now 3\); give those, or another --run\.name"):
        resume(tmp_path / "x", longer)  # there is no model yet
    (tmp_path / "x" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"was 2, now 3\); to train longer.*--model\.init \S+/x --run\.name x_longer"):
        resume(tmp_path / "x", longer)


def test_resuming_refuses_other_data(tmp_path):
    before = {"num_images": 5, "classes": ["a", "b"], "backend": "ffcv"}
    check_data(tmp_path, before, dict(before))
    del before["backend"]  # as in checkpoints from before it was kept
    check_data(tmp_path, before, before | {"backend": "folder"})
    for change in ({"num_images": 4}, {"classes": ["a", "c"]}, {"backend": "folder"}):
        now = before | {"backend": "ffcv"}
        with pytest.raises(UserError, match="was trained on 5 images of 2 classes, read by the ffcv backend"):
            check_data(tmp_path, now, now | change)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    open_run(tmp_path, CONFIG)
    save_checkpoint(tmp_path, {"step": 3, "model": torch.randn(1000)})
    whole = checkpoint_path(tmp_path).read_bytes()
    checkpoint_path(tmp_path).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"last\.pt is truncated or not a checkpoint"):
        load_checkpoint(tmp_path)


# A module has code inside, which is not executed.
@pytest.mark.parametrize("content", [{"state_dict": {}}, {"format": "mrl-checkpoint-0"}, torch.nn.Linear(1, 1)])
def test_a_foreign_checkpoint_is_refused(tmp_path, content):
    open_run(tmp_path, CONFIG)
    torch.save(content, checkpoint_path(tmp_path))
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    open_run(tmp_path, CONFIG)
    save_checkpoint(tmp_path, {"step": 3})

    def full(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            save_checkpoint(tmp_path, {"step": 4})
    assert load_checkpoint(tmp_path)["step"] == 3
    assert os.listdir(tmp_path / "checkpoints") == ["last.pt"]


def test_a_disk_that_fills_while_torch_saves_is_an_os_error_although_torch_wraps_it(tmp_path):
    class Full:
        def write(self, content):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    with pytest.raises(UserError, match="No space left on device"):
        atomic_write(tmp_path / "a", lambda file: torch.save({"w": torch.zeros(10)}, Full()))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_bug_or_ctrl_c_during_a_write_is_no_failed_write(tmp_path, error):
    (tmp_path / "a").write_text("old")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as raised:
        atomic_write(tmp_path / "a", write)
    assert raised.value is error
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_kill_9_while_saving_leaves_a_loadable_checkpoint(tmp_path):
    program = (
        "import sys, torch; from pathlib import Path; from mrl.rundir import *\n"
        "d = Path(sys.argv[1]); open_run(d, 'run: {name: a}')\n"
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
    assert state["step"] > 0 and (state["model"] == state["step"]).all()


def test_provenance_keeps_every_start(tmp_path):
    for step, world_size in ((0, 1), (0, 1), (2, 4)):
        record_start(tmp_path, step, world_size, 8)
    starts = json.loads((tmp_path / "provenance.json").read_text())
    assert [(start["start_step"], start["world_size"]) for start in starts] == [(0, 1), (2, 4)]
    assert all(start["folder"] == os.getcwd() for start in starts)
    assert all(start["micro_batch_size"] == 8 and start["numpy"] == np.__version__ for start in starts)
    assert all(starts[0][key] for key in ("python", "torch", "timm", "platform", "cpu"))
    assert starts[0]["time_utc"].endswith("+00:00")


def test_provenance_names_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*argv):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *argv], check=True, capture_output=True)

    monkeypatch.setattr(rundir, "__file__", str(tmp_path / "mrl" / "rundir.py"))
    assert (provenance()["git_commit"], provenance()["git_dirty"]) == (None, None)
    git("init")
    assert provenance()["git_commit"] is None, "no commit yet"
    git("commit", "--allow-empty", "-m", "first")
    found = provenance()
    assert len(found["git_commit"]) == 40 and found["git_dirty"] is False
    (tmp_path / "new.py").write_text("")
    assert provenance()["git_dirty"] is True
    # A copy that is installed below a checkout is not of that commit.
    monkeypatch.setattr(rundir, "__file__", str(tmp_path / ".venv" / "mrl" / "rundir.py"))
    assert provenance()["git_commit"] is None


def test_a_run_of_before_exif_rotation_goes_on_only_without_it(tmp_path):
    open_run(tmp_path, CONFIG + "data: {root: pets}\n")
    save_checkpoint(tmp_path, {"step": 3})
    new = CONFIG.replace("never", "auto") + "data: {root: pets, exif_rotation: RULE}\n"
    defaults = DEFAULTS + "data: {exif_rotation: apply}\n"
    check_run(tmp_path, "auto", new.replace("RULE", "ignore"), defaults)
    with pytest.raises(UserError, match="data.exif_rotation was 'ignore', now 'apply'"):
        check_run(tmp_path, "auto", new.replace("RULE", "apply"), defaults)
