import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mrl import rundir
from mrl.errors import UserError
from mrl.rundir import (
    atomic_write,
    check_data,
    check_run,
    checkpoint_path,
    hold,
    last_validation,
    load_checkpoint,
    open_run,
    provenance,
    read_metrics,
    record_start,
    save_checkpoint,
)

CONFIG = "run: {name: a, resume: never}\noptim: {lr: 0.1}\n"
DEFAULTS = "optim: {lr: 0.4, layer_decay: 1.0}\ntrain: {sync_batchnorm: false, compile: false, accumulation_steps: 1}\n"


def resume(directory, config_yaml):
    check_run(directory, "auto", config_yaml, DEFAULTS)


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
    resume(tmp_path, CONFIG.replace("name: a", "name: b"))  # the folder was renamed
    resume(tmp_path, CONFIG + "train: {compile: true, accumulation_steps: 2, sync_batchnorm: false}\n")
    with pytest.raises(UserError, match=r"\(optim\.lr was 0\.1, now 0\.2\)"):
        resume(tmp_path, CONFIG.replace("0.1", "0.2"))
    # A setting that is newer than the run had its default.
    with pytest.raises(UserError, match=r"train\.sync_batchnorm was False, now True"):
        resume(tmp_path, CONFIG + "train: {sync_batchnorm: true}\n")
    # Runs of before this one took pixels as stored, which is not the default.
    resume(tmp_path, CONFIG + "data: {exif_rotation: ignore}\n")
    with pytest.raises(UserError, match="data.exif_rotation was 'ignore', now 'apply'"):
        resume(tmp_path, CONFIG + "data: {exif_rotation: apply}\n")
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
    ours, theirs = multiprocessing.Pipe()

    def train():
        with hold(tmp_path):
            theirs.send("held")
            time.sleep(60)

    child = multiprocessing.get_context("fork").Process(target=train)
    child.start()
    assert ours.recv() == "held"
    for start in (lambda: check_run(tmp_path, "auto", CONFIG, DEFAULTS), lambda: open_run(tmp_path, CONFIG)):
        with pytest.raises(UserError, match="another process is training in"):
            start()
    child.kill()
    child.join()
    resume(tmp_path, CONFIG)


def test_training_longer_is_refused_with_the_command_that_does_it(tmp_path):
    config = CONFIG + "train: {epochs: 2}\n"
    open_run(tmp_path / "x", config)
    save_checkpoint(tmp_path / "x", {"step": 3})
    longer = config.replace("epochs: 2", "epochs: 3")
    with pytest.raises(UserError, match=r"now 3\); --config .*config.yaml gives those; or give another --run\.name"):
        resume(tmp_path / "x", longer)  # there is no model yet
    (tmp_path / "x" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"was 2, now 3\); to train longer.*--model\.init \S+/x --run\.name x_longer"):
        resume(tmp_path / "x", longer)


def test_resuming_refuses_other_data(tmp_path):
    before = {"num_images": 5, "num_val": 3, "classes": ["a", "b"], "backend": "ffcv"}
    check_data(tmp_path, before, dict(before))
    old = {key: before[key] for key in ("num_images", "classes")}  # as in checkpoints from before the others were kept
    check_data(tmp_path, old, before | {"backend": "folder"})
    said = r"was trained on 5 images of 2 classes \(and 3 for validation\), read by the ffcv backend"
    for change in ({"num_images": 4}, {"num_val": 2}, {"classes": ["a", "c"]}, {"backend": "folder"}):
        with pytest.raises(UserError, match=said):
            check_data(tmp_path, before, before | change)


def half(file):
    state = {"format": "mrl-checkpoint-1", "model": torch.randn(1000)}
    content = io.BytesIO()
    torch.save(state, content)
    file.write(content.getvalue()[: content.tell() // 2])


# A module has code inside, which is not executed.
@pytest.mark.parametrize(
    "write", [half, *(partial(torch.save, each) for each in ({"format": "mrl-checkpoint-0"}, torch.nn.Linear(1, 1)))]
)
def test_a_truncated_or_foreign_checkpoint_is_refused(tmp_path, write):
    open_run(tmp_path, CONFIG)
    assert load_checkpoint(tmp_path) is None
    with checkpoint_path(tmp_path).open("wb") as file:
        write(file)
    with pytest.raises(UserError, match=r"last\.pt is truncated or not a checkpoint of this version"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_broken(tmp_path, monkeypatch, error):
    open_run(tmp_path, CONFIG)
    save_checkpoint(tmp_path, {"step": 1})
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as caught:
        load_checkpoint(tmp_path)
    assert caught.value is error


@pytest.mark.parametrize("place", ["os.fsync", "torch.save"])
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, place):
    open_run(tmp_path, CONFIG)
    save_checkpoint(tmp_path, {"step": 3, "model": {"w": torch.arange(4.0)}})

    def full(*_):
        raise OSError(28, "No space left on device")

    real, broken = torch.save, SimpleNamespace(write=full, flush=lambda: None)
    change = full if place == "os.fsync" else lambda content, _: real(content, broken)  # an error that torch wraps
    with monkeypatch.context() as patch:
        patch.setattr(place, change)
        with pytest.raises(UserError, match="No space left on device.* is kept; free some disk space"):
            save_checkpoint(tmp_path, {"step": 4, "model": torch.zeros(10)})
    state = load_checkpoint(tmp_path)
    assert state["step"] == 3 and torch.equal(state["model"]["w"], torch.arange(4.0))
    assert os.listdir(tmp_path / "checkpoints") == ["last.pt"]


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


def test_provenance_keeps_every_start(tmp_path):
    for step, world_size in ((0, 1), (0, 1), (2, 4)):
        record_start(tmp_path, step, world_size, 8)
    starts = json.loads((tmp_path / "provenance.json").read_text())
    assert [(start["start_step"], start["world_size"]) for start in starts] == [(0, 1), (2, 4)]
    assert all(start["micro_batch_size"] == 8 and start["folder"] == os.getcwd() for start in starts)
    assert all(starts[0][key] for key in ("python", "torch", "timm", "numpy", "platform", "cpu"))
    assert starts[0]["time_utc"].endswith("+00:00")


def test_provenance_names_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def git(*argv):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *argv], check=True, capture_output=True)

    def found():
        return provenance()["git_commit"], provenance()["git_dirty"]

    monkeypatch.setattr(rundir, "__file__", str(tmp_path / "mrl" / "rundir.py"))
    assert found() == (None, None)
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    commit, dirty = found()
    assert len(commit) == 40 and dirty is False
    (tmp_path / "new.py").write_text("")
    assert found() == (commit, True)
    # A copy that is installed below a checkout is not of that commit.
    monkeypatch.setattr(rundir, "__file__", str(tmp_path / ".venv" / "mrl" / "rundir.py"))
    assert found() == (None, None)


def test_a_process_that_waits_for_another_says_so_once_and_goes_on(tmp_path, monkeypatch, capsys):
    slept, other = [], contextlib.ExitStack()
    other.enter_context(hold(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or (len(slept) == 3 and other.close()))
    with hold(tmp_path, "waiting for another"):
        assert len(slept) == 3 and capsys.readouterr().out.count("waiting for another") == 1


def test_metrics_are_read_without_half_a_line_and_the_last_validation_is_that_of_the_last_row_with_one(tmp_path):
    assert read_metrics(tmp_path) == [] and last_validation(tmp_path) == {}
    rows = [{"step": 1, "top_1/8": 0.25}, {"step": 2, "top_1/8": 0.5, "top_1/16": 0.75, "val_loss/8": 1.0}, {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert read_metrics(tmp_path) == rows and last_validation(tmp_path) == {8: 0.5, 16: 0.75}
