"""What users give that does not fit together: one sentence that names it, before anything is written, and a way on."""

import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import time

import pytest
import torch

import eval as evaluation  # not `eval`, which is Python's own
import train
from mrl import distributed
from mrl.config import parse_command_line, read_config
from mrl.data import folder, memory
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.model import build_backbone, build_model
from mrl.studies.run import embed_runs, open_run
from mrl.studies.transfer import TransferImages
from mrl.training import logging
from mrl.training.fit import check_fit, notes
from mrl.training.logging import advice
from tests.test_train import (  # noqa: F401
    TINY,
    _on_the_cpu,
    assert_same_runs,
    fork,
    make_folder,
    rows,
    run,
    run_until,
    straight,
    weights,
)

SMALL_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}


def error_of(directory, capsys, *argv):
    """The error of a training that must end before its run directory exists."""
    assert run(directory, *argv) == 2
    assert not (directory / "a").exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


def config_of(*argv):
    return parse_command_line(["--config", "digits_mrl", *argv], "")


def check(*argv, micro_batch_size=2):
    config = config_of(*argv)
    wanted = config.model
    backbone = build_backbone(wanted.backbone, "scratch", wanted.stem_stride, wanted.blurpool, wanted.kwargs)
    check_fit(build_model(backbone, 3), config, micro_batch_size)


@pytest.mark.parametrize(
    ("backbone", "kwargs", "remedy"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, "img_size: 48"),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "embed_dim": 24}, "img_size: 48"),
        (
            "efficientformer_l1",
            {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]},
            "own size: --data.train_px 224",
        ),
    ],
)
def test_a_model_of_fixed_image_size_is_refused_with_arguments_that_work(backbone, kwargs, remedy, capsys, tmp_path):
    size = ["--data.train_px", "48", "--data.eval_px", "48", "--data.eval_resize_px", "48", "--train.epochs", "1"]
    argv = [*TINY, *size, "--model.backbone", backbone, "--model.kwargs", json.dumps(kwargs)]
    error = error_of(tmp_path, capsys, *argv)
    assert f"error: {backbone} does not work at data.train_px 48: " in error and remedy in error
    check(*argv[2:], *shlex.split(error[error.index("--") :]))


def test_every_resolution_of_the_run_is_tried_and_no_other():
    vit = ["--model.backbone", "vit_tiny_patch16_224", "--model.kwargs", json.dumps(SMALL_VIT)]
    schedule = ["--data.train_px", "[[0, 32], [5, 40]]"]
    check(*vit, *schedule, "--train.epochs", "5")
    with pytest.raises(UserError, match=r"at data\.train_px 40: .*dynamic_img_size: true"):
        check(*vit, *schedule, "--train.epochs", "6")
    with pytest.raises(UserError, match=r"at data\.eval_px 24: "):
        check(*vit, "--data.eval_px", "24")
    dynamic = ["--model.kwargs", json.dumps(SMALL_VIT | {"dynamic_img_size": True})]
    check(*vit[:2], *dynamic, *schedule, "--train.epochs", "6", "--data.eval_px", "24")


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ("{in_chans: 1, drop_path_rate: 0.1}", ["data.train_px 32", "take {in_chans: 1} out of model.kwargs"]),
        ('{global_pool: ""}', ["not one pooled vector of 512 numbers", "take {global_pool: ''} out of model.kwargs"]),
        ("{features_only: true}", ["{'features_only': True} does not fit resnet10t: it gives no pooled vector"]),
        ("{drop_path_rate: 0.1, block: 3}", ["model.kwargs {'block': 3} does not fit resnet10t"]),
        ("{drop_rate: 3}", ["take {drop_rate: 3} out of model.kwargs"]),
        ("{output_stride: 3}", ["model.kwargs {'output_stride': 3} does not fit resnet10t: AssertionError"]),
        ("{unheard_of: 3}", ["model.kwargs {'unheard_of': 3} does not fit resnet10t", "unexpected keyword"]),
        ("{num_classes: 3}", ["model.kwargs num_classes is not allowed; it is set by the classes of the data"]),
    ],
)
def test_a_model_argument_that_does_not_fit_is_named(kwargs, parts, tmp_path, capsys):
    error = error_of(tmp_path, capsys, "--config", "digits_mrl", "--model.kwargs", kwargs)
    assert all(part in error for part in parts), error


def test_batchnorm_on_one_image_at_a_time_names_the_settings(tmp_path, capsys):
    argv = ["--data.batch_size", "8", "--train.accumulation_steps", "8"]
    error = error_of(tmp_path, capsys, "--config", "digits_mrl", *argv)
    assert "BatchNorm needs more than one image at a time: raise data.batch_size, now 8, or lower" in error
    assert "train.accumulation_steps, now 8" in error


def test_the_trial_leaves_the_model_as_it_was():
    model = build_model(build_backbone("resnet10t"), 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_fit(model, config_of(), 4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_moving_average_warms_up_and_both_models_are_validated(tmp_path, capsys):
    """With a constant decay of 0.9999 the saved model would be the one before training, at chance."""
    argv = ["--config", "digits_mrl", "--train.epochs", "2", "--data.train_px", "16", "--data.eval_px", "16"]
    argv += ["--data.eval_resize_px", "16", "--train.ema_decay", "0.9999", "--optim.warmup_epochs", "0"]
    assert run(tmp_path, *argv) == 0
    last = rows(tmp_path)[-1]
    dims = [key.removeprefix("top_1/") for key in last if key.startswith("top_1/")]
    assert all(last[f"top_1/{dim}"] > 0.3 for dim in dims)
    assert {f"no_ema_{kind}/{dim}" for kind in ("top_1", "val_loss") for dim in dims} <= last.keys()
    assert any(last[f"top_1/{dim}"] != last[f"no_ema_top_1/{dim}"] for dim in dims)
    printed = capsys.readouterr().out
    assert "epoch 2: top-1 of the moving average (saved) 0." in printed and "epoch 2: top-1 without it 0." in printed
    average = torch.load(tmp_path / "a" / "checkpoints" / "last.pt")["ema"]
    assert all(torch.equal(value, average[key]) for key, value in weights(tmp_path).items()), "the average is saved"


def test_settings_that_were_changed_or_work_badly_are_said(monkeypatch):
    def found(*argv, device="cpu", batch_size=64, warmup_epochs=2):
        config = config_of("--data.batch_size", "64", "--optim.warmup_epochs", "2", *argv)
        return notes(config, torch.device(device), 1442, batch_size, warmup_epochs)

    vit = ["--model.backbone", "vit_tiny_patch16_224", "--model.init", "pretrained"]
    assert found() == found(*vit) == []
    [note] = found(*vit, "--data.mean", "[0.485, 0.456, 0.406]")
    assert "data.mean [0.485, 0.456, 0.406]" in note
    assert "not those of the weights in model.init, [0.5, 0.5, 0.5]" in note
    cut, shortened = found(batch_size=32, warmup_epochs=0.5)
    assert cut.startswith("batch cut from 64 to 32 images") and shortened == "warm-up shortened from 2 to 0.5 epochs"
    for capability, number in (((7, 5), 1), ((8, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        some = found("--train.precision", "bf16", device="cuda")
        assert len(some) == number and all("--train.precision fp16 is faster" in note for note in some)


def test_a_home_folder_in_a_recipe_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {dir: ~/runs}\ndata: {root: ~/pets}\nmodel: {init: ~/weights.pt}\n")
    config = read_config(recipe)
    found = [config.run.dir, config.data.root, config.model.init]
    assert found == [f"{tmp_path}/{name}" for name in ("runs", "pets", "weights.pt")]
    assert parse_command_line(["--config", "~/recipe.yaml", "--run.dir=~/other"], "").run.dir == f"{tmp_path}/other"
    (tmp_path / "run").mkdir()
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_px": 64, "resize_px": 72}
    (tmp_path / "run" / "model.json").write_text(json.dumps(about))
    found = parse_command_line(["--model.init=~/run"], "").data
    assert (found.eval_px, found.mean) == (64, (0.5, 0.5, 0.5)), "as the weights were trained"


@pytest.mark.parametrize(
    ("argv", "form"),
    [
        (["--data.crop_scale", "0.35", "1.0"], "--data.crop_scale '[0.35, 1.0]'"),
        (["--data.crop_scale=(0.35, 1.0)"], "--data.crop_scale '[0.35, 1.0]'"),
        (["--data.crop_scale", "0.35"], "--data.crop_scale '[0.08, 1.0]'"),
        (["--optim.lr", "0.1", "--head.nesting_list", "8", "16", "--run.seed", "1"], "--head.nesting_list '[8, 16]'"),
        (["--data.train_px", "0", "160"], "--data.train_px '[[0, 160], [32, 192]]'"),
        (["--model.kwargs", "img_size=64", "patch_size=8"], "--model.kwargs '{img_size: 64, patch_size: 8}'"),
    ],
)
def test_a_list_that_is_no_yaml_is_answered_with_the_form_that_works(argv, form):
    with pytest.raises(UserError) as raised:
        config_of(*argv)
    assert str(raised.value).endswith(f"; write it as one word in YAML: {form}")
    key, value = form.split(" ", 1)
    config_of(key, value.strip("'"))


def test_training_on_keeps_the_head_if_classes_and_sizes_agree(straight, tmp_path, capsys):  # noqa: F811
    longer = [*TINY, "--train.epochs", "3"]
    assert run(straight, *longer, "--run.resume", "auto") == 2
    command = capsys.readouterr().err.partition("are the same: ")[2].split()
    assert command == ["--model.init", str(straight / "a"), "--run.name", "a_longer"]
    nothing_learned = ["--optim.lr", "1e-30", "--train.epochs", "1"]
    for name, change in (
        ("same", []),
        ("sizes", ["--head.nesting_list", "[8, 32]"]),
        ("tied", ["--head.tied", "true"]),
    ):
        assert run(tmp_path, *longer, *command[:2], *change, *nothing_learned, name=name) == 0
        assert ("the head is that of" in capsys.readouterr().out) == (name == "same")
    before, after = weights(straight), weights(tmp_path, "same")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


@pytest.mark.parametrize("kind", ["run", "file"])
def test_a_run_resumes_without_the_weights_that_it_began_with(straight, tmp_path, capsys, kind):  # noqa: F811
    init = tmp_path / "init"
    if kind == "run":
        shutil.copytree(straight / "a", init)
    else:
        state = {key: value for key, value in weights(straight).items() if key.startswith("backbone.")}
        torch.save({key.removeprefix("backbone."): value for key, value in state.items()}, init)
    argv = [*TINY, "--model.init", str(init), "--run.resume", "auto"]
    assert run(tmp_path, *argv) == 0
    run_until(2, tmp_path, *argv, name="b")
    init.rename(tmp_path / "elsewhere")
    if kind == "run":  # which the defaults of mean, std etc. came from
        assert run(tmp_path, *argv, name="b") == 2
        assert f"now [0.5, 0.5, 0.5]); --config {tmp_path}/b/config.yaml gives those" in capsys.readouterr().err
        argv = ["--config", f"{tmp_path}/b/config.yaml", "--run.resume", "auto"]
    assert run(tmp_path, *argv, name="b") == 0
    assert_same_runs(tmp_path, "a", "b")


def folder_argv(root, *argv):
    found = [*TINY, "--data.name", "folder", "--data.root", str(root), "--data.num_classes", "2", "--train.epochs", "1"]
    return [*found, "--data.batch_size", "4", "--data.num_workers", "1", *argv]


def test_full_shared_memory_ends_the_run_with_a_sentence(make_folder):  # noqa: F811
    """A limit on the size of files stands in for a small /dev/shm: a batch of 128 px does not fit in 100 kB."""
    root = make_folder(["cat", "dog"], 8, 2)
    argv = ["--data.train_px", "128", "--data.eval_px", "128", "--data.eval_resize_px", "128"]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return run(root, *folder_argv(root, *argv))

    child = fork(root / "log", limited)
    child.join(120)
    errors = (root / "log").read_text()
    assert child.exitcode == 2 and "Traceback" not in errors
    assert "error: shared memory is full (" in errors and "docker run --shm-size" in errors
    assert "data.num_workers" in errors


@pytest.mark.parametrize(
    ("backend", "number", "status"),
    [
        ("folder", signal.SIGTERM, 143),
        ("folder", signal.SIGINT, 130),
        ("folder", signal.SIGKILL, 2),  # of the worker process
        ("memory", signal.SIGTERM, -signal.SIGTERM),  # whose threads decode before the training
        ("memory", signal.SIGINT, 130),
    ],
)
def test_a_run_that_waits_for_a_disk_in_vain_ends(make_folder, monkeypatch, backend, number, status):  # noqa: F811
    root = make_folder(["cat", "dog"], 8, 2)
    (root / "pids").mkdir()
    trainer, real = os.getpid(), folder.decode

    def decode(path, exif_rotation):
        if backend == "folder" and multiprocessing.parent_process().pid == trainer:  # the check before the training
            return real(path, exif_rotation)
        (root / "pids" / str(os.getpid())).touch()
        time.sleep(1000)

    monkeypatch.setattr(logging, "SECONDS_TO_WAIT", 0.5)
    monkeypatch.setattr(folder if backend == "folder" else memory, "decode", decode)
    child = fork(root / "log", run, root, *folder_argv(root, "--data.backend", backend))
    deadline = time.monotonic() + 60
    while not list((root / "pids").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    [waiting] = [int(path.name) for path in (root / "pids").iterdir()]
    os.kill(waiting if number == signal.SIGKILL else child.pid, number)
    child.join(20)
    if child.exitcode is None:  # once in many suites, this fork beside the threads of other tests lost the signal
        os.kill(child.pid, number)
        child.join(20)
    errors = (root / "log").read_text()
    assert child.exitcode == status and "Traceback" not in errors
    if backend == "folder":
        with pytest.raises(ProcessLookupError):
            os.kill(waiting, 0)
        killed = "a worker process that reads images was killed, most often because the memory was full"
        kept = "interrupted; the last checkpoint, if there is one, is kept"
        assert (killed if number == signal.SIGKILL else kept) in errors


def test_a_signal_ends_a_long_validation(tmp_path, monkeypatch, capsys):
    """Its checkpoint is there already, so that the resumed run begins with it."""
    monkeypatch.setattr(logging, "SECONDS_TO_WAIT", 0.2)

    def slow(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", slow)
        assert run(tmp_path, *TINY) == 143
    assert run(tmp_path, *TINY, "--run.resume", "auto") == 0
    assert [row["step"] for row in rows(tmp_path) if "top_1/8" in row] == [5, 10]


def test_images_that_have_moved_are_found_from_anywhere_or_by_data_root(make_folder, monkeypatch, capsys):  # noqa: F811
    """A relative data.root counts from the folder of the training; elsewhere, --data.root tells the new place."""
    root = make_folder(["cat", "dog"], 8, 4)
    pets, elsewhere, run_directory = root / "work" / "pets", root / "elsewhere", str(root / "a")
    pets.mkdir(parents=True)
    elsewhere.mkdir()
    for split in ("train", "val"):
        (root / split).rename(pets / split)
    monkeypatch.chdir(root / "work")
    assert run(root, *folder_argv("pets"), "--data.num_workers", "0") == 0
    monkeypatch.chdir(elsewhere)

    def embed(*argv, force=True):
        process, args = Process(0, 1, torch.device("cpu")), evaluation.parse(["--runs", run_directory, *argv])
        [opened] = embed_runs({"a": root / "a"}, TransferImages(), 8, force, process, settings=args.settings)
        return opened

    capsys.readouterr()
    before = embed()
    assert f"run a: data.root 'pets' counts from the folder of its training: {pets}" in capsys.readouterr().out
    embed("--data.root", "pets", force=False)
    assert "stored embeddings" not in capsys.readouterr().out, "they are of this folder"
    pets.rename(elsewhere / "cats and dogs")
    with pytest.raises(UserError, match=r"the images of run a are not at 'pets' \(seen from .*: --data\.root DIR"):
        embed()
    moved = embed("--data.root", "cats and dogs", "--data.num_workers", "1")
    assert torch.equal(torch.tensor(moved.train.vectors), torch.tensor(before.train.vectors))
    assert moved.source.dataset == "pets", "results keep the name of the data"
    assert moved.images("val", [0]).shape == (1, 3, 32, 32)
    embed("--data.root", "cats and dogs", "--data.backend", "memory")
    printed = capsys.readouterr().out
    assert "memory backend (as data.backend says)" in printed and "stored embeddings" not in printed
    embed("--data.root", "cats and dogs", force=False)
    said = "run a: stored embeddings are used, not the images in cats and dogs; --force embeds these"
    assert said in capsys.readouterr().out
    opened = open_run(root / "a", "cats and dogs")
    assert opened.images("val", [0]).shape == (1, 3, 32, 32)
    (elsewhere / "cats and dogs").rename(elsewhere / "gone")
    evaluation.draw_pictures(opened, elsewhere, Process(0, 1, torch.device("cpu")), None)
    printed = capsys.readouterr().out
    assert "no picture of neighbors: " in printed and f"figure: {elsewhere / 'confusions_pets.png'}" in printed


def test_an_evaluation_takes_no_other_setting_of_a_run(capsys):
    with pytest.raises(SystemExit):
        evaluation.parse(["--runs", "runs/a", "--optim.lr", "1"])
    assert "unrecognized arguments: --optim.lr 1" in capsys.readouterr().err


def test_an_exhausted_machine_is_told_what_to_change(capsys):
    def ended_by(error):
        def fail():
            raise error

        assert distributed.run(fail, "interrupted") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    bus = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are out of memory."
    for error, advice_ in [
        (RuntimeError(bus), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "fewer worker processes"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "fewer worker processes"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (OSError(28, "No space left on device", "x/metrics.jsonl"), "free some disk space"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "lower --batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "lower --batch_size"),
        (MemoryError(), "out of memory; lower --batch_size"),
    ]:
        assert advice_ in ended_by(error), error
    with pytest.raises(RuntimeError, match="a bug"):
        ended_by(RuntimeError("a bug"))
    message = r"the machine ran out of memory .*--train\.accumulation_steps, now 1"
    with pytest.raises(UserError, match=message), advice(config_of(), 1):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
