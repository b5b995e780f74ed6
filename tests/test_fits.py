"""What users give that does not fit together: one sentence that names it, before anything is written, and a way on."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import eval as evaluation  # not `eval`, which is Python's own
import mrl
import train
from mrl import distributed
from mrl.config import parse_command_line, read_config
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.model import build_backbone, build_model
from mrl.studies.run import embed_runs, open_run
from mrl.studies.transfer import TransferImages
from mrl.training import fit, logging
from mrl.training.fit import check_fit, notes
from mrl.training.logging import advice
from tests.test_train import REPOSITORY, TINY, _on_the_cpu, make_folder, rows, run, weights  # noqa: F401

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
        ("levit_128s", {"depth": [1, 1, 1]}, "img_size: 48"),
    ],
)
def test_a_model_of_fixed_image_size_is_refused_with_arguments_that_work(backbone, kwargs, remedy, capsys, tmp_path):
    size = ["--data.train_px", "48", "--data.eval_px", "48", "--data.eval_resize_px", "48", "--train.epochs", "1"]
    argv = [*TINY, *size, "--model.backbone", backbone]
    error = error_of(tmp_path, capsys, *argv, "--model.kwargs", json.dumps(kwargs))
    assert f"error: {backbone} does not work at data.train_px 48: " in error and remedy in error
    check(*argv[2:], "--model.kwargs", error.partition("give --model.kwargs '")[2].rstrip("'"))


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


def test_a_model_too_deep_for_small_images_is_given_its_own_size(monkeypatch):
    """The way out when no argument helps; the work of building big models is left out."""
    monkeypatch.setattr(fit, "_try", lambda model, n, key, px, *rest: None if px == 176 else {}["too small"])
    with pytest.raises(UserError, match="give it its own size: --data.train_px 176 --data.eval_px 176 --data.eval_r"):
        check()


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
        ("{pretrained: true}", ["model.kwargs pretrained is not allowed; it is set by model.init"]),
    ],
)
def test_a_model_argument_that_does_not_fit_is_named(kwargs, parts, tmp_path, capsys):
    error = error_of(tmp_path, capsys, "--config", "digits_mrl", "--model.kwargs", kwargs)
    assert all(part in error for part in parts), error


@pytest.mark.parametrize("init", ["scratch", "pretrained"])
def test_an_unknown_pretrained_tag_lists_those_there_are(init):
    with pytest.raises(UserError, match=r"'resnet10t\.bogus': timm has no such weights; tags: c3_in1k"):
        build_backbone("resnet10t.bogus", init)


def test_batchnorm_on_one_image_at_a_time_names_the_settings(tmp_path, capsys):
    error = error_of(tmp_path, capsys, "--config", "digits_mrl", "--data.batch_size", "8", *ACCUMULATE)
    assert "BatchNorm needs more than one image at a time: raise data.batch_size, now 8, or lower" in error
    assert "train.accumulation_steps, now 8" in error


ACCUMULATE = ["--train.accumulation_steps", "8"]


def test_the_trial_leaves_the_model_as_it_was():
    model = build_model(build_backbone("resnet10t"), 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_fit(model, config_of(), 4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_corrected_command_is_not_refused_because_of_a_failed_first_try(tmp_path, monkeypatch, capsys):
    real = train.nested_cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(train, "nested_cross_entropy", lambda *args: real(*args) * float("nan"))
        assert run(tmp_path, *TINY) == 2
    assert "is not finite" in capsys.readouterr().err
    assert run(tmp_path, *TINY, "--optim.lr", "0.001", "--train.epochs", "1") == 0


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
    model = mrl.load(tmp_path / "a")
    images = train.build_data(parse_command_line(argv, "").data, 0, torch.device("cpu"), False)["val"]
    [(batch, labels)] = images.eval_batches([list(range(len(images)))])
    with torch.no_grad():
        saved = (model(batch)[-1].argmax(-1) == labels).double().mean()
    assert float(saved) == pytest.approx(last[f"top_1/{dims[-1]}"], abs=1e-9), "the average is the one that is saved"


def test_normalization_comes_from_the_weights_unless_given(saved_run):
    """timm's vit_tiny expects 0.5; a run's own is in its model.json."""
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    vit = ["--model.backbone", "vit_tiny_patch16_224"]
    assert config_of(*vit).data.mean == imagenet
    assert config_of(*vit, "--model.init", "pretrained").data.mean == half
    assert config_of(*vit, "--model.init", "weights.safetensors").data.std == half
    given = config_of(*vit, "--model.init", "pretrained", "--data.mean", "[0.4, 0.4, 0.4]").data
    assert given.mean == (0.4, 0.4, 0.4) and given.std == half
    path = saved_run / "model.json"
    content = path.read_text()
    path.write_text(json.dumps(json.loads(content) | {"mean": [0.1, 0.2, 0.3]}))
    try:
        assert config_of("--model.init", str(saved_run)).data.mean == (0.1, 0.2, 0.3)
    finally:
        path.write_text(content)


def test_another_normalization_than_that_of_the_weights_is_said():
    cpu = torch.device("cpu")
    vit = ["--model.backbone", "vit_tiny_patch16_224", "--model.init", "pretrained"]
    assert notes(config_of(*vit), cpu) == [] == notes(config_of(), cpu)
    [note] = notes(config_of(*vit, "--data.mean", "[0.485, 0.456, 0.406]"), cpu)
    assert "data.mean [0.485, 0.456, 0.406]" in note
    assert "not those of the weights in model.init, [0.5, 0.5, 0.5]" in note


def test_bf16_on_a_gpu_without_it_is_said(monkeypatch):
    for capability, expected in (((7, 5), 1), ((8, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        found = notes(config_of("--train.precision", "bf16"), torch.device("cuda", 0))
        assert len(found) == expected and all("--train.precision fp16 is faster" in note for note in found)
    assert notes(config_of("--train.precision", "fp16"), torch.device("cuda", 0)) == []


def test_a_home_folder_in_a_recipe_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {dir: ~/runs}\ndata: {root: ~/pets}\nmodel: {init: ~/weights.pt}\n")
    config = read_config(recipe)
    found = [config.run.dir, config.data.root, config.model.init]
    assert found == [f"{tmp_path}/{name}" for name in ("runs", "pets", "weights.pt")]
    assert parse_command_line(["--config", "~/recipe.yaml", "--run.dir=~/other"], "").run.dir == f"{tmp_path}/other"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.mean", "[123.7, 116.3, 103.5]"], r"data\.mean is .*numbers from 0 to 1 \(white is 1, not 255\)"),
        (["--data.std", "[0.2, 0, 0.2]"], r"data\.std is .*numbers above 0, up to 1"),
        (["--data.std", "[58.4, 57.1, 57.4]"], r"data\.std is .*numbers above 0, up to 1"),
        (["--data.root", ""], r"data\.root is ''; allowed: the folder that holds train/ and val/"),
        (["--optim.lr", ".inf"], r"optim\.lr is inf; allowed: finite numbers"),
        (["--optim.lr", ".nan"], r"optim\.lr is nan; allowed: above 0"),
        (["--optim.weight_decay", ".inf"], r"optim\.weight_decay is inf; allowed: finite numbers"),
        (["--data.crop_ratio", "[0.5, .inf]"], r"data\.crop_ratio is \(0\.5, inf\); allowed: finite numbers"),
        (["--data.mixup", ".inf"], r"data\.mixup is inf; allowed: finite numbers"),
    ],
)
def test_impossible_numbers_and_places_are_refused_by_their_key(argv, message):
    with pytest.raises(UserError, match=message):
        config_of(*argv)


@pytest.mark.parametrize(
    ("argv", "form"),
    [
        (["--data.crop_scale", "0.35", "1.0"], "--data.crop_scale '[0.35, 1.0]'"),
        (["--data.crop_scale", "0.35,1.0"], "--data.crop_scale '[0.35, 1.0]'"),
        (["--data.crop_scale=(0.35, 1.0)"], "--data.crop_scale '[0.35, 1.0]'"),
        (["--data.crop_scale", "[0.35,", "1.0]"], "--data.crop_scale '[0.35, 1.0]'"),
        (["--data.crop_scale", "0.35"], "--data.crop_scale '[0.08, 1.0]'"),
        (["--optim.lr", "0.1", "--head.nesting_list", "8", "16", "--run.seed", "1"], "--head.nesting_list '[8, 16]'"),
        (["--model.trainable", "layer3", "layer4"], "--model.trainable '[layer3, layer4]'"),
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


def test_training_on_keeps_the_head_if_classes_and_sizes_agree(tmp_path, capsys):
    assert run(tmp_path, *TINY) == 0
    longer = [*TINY, "--train.epochs", "3"]
    assert run(tmp_path, *longer, "--run.resume", "auto") == 2
    command = capsys.readouterr().err.partition("are the same: ")[2].split()
    assert command == ["--model.init", str(tmp_path / "a"), "--run.name", "a_longer"]
    nothing_learned = ["--optim.lr", "1e-30", "--train.epochs", "1"]
    assert train.main([*longer, *command, "--run.dir", str(tmp_path), *nothing_learned]) == 0
    assert "the head is that of" in capsys.readouterr().out
    before, after = weights(tmp_path), weights(tmp_path, "a_longer")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    for name, other in (("sizes", ["--head.nesting_list", "[8, 32]"]), ("tied", ["--head.tied", "true"])):
        assert run(tmp_path, *longer, *command[:2], *other, *nothing_learned, name=name) == 0
        assert "the head is that of" not in capsys.readouterr().out


def start(root, *argv, script="train.py", limit=None):
    command = [sys.executable, script, *argv]
    limits = None if limit is None else (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, preexec_fn=limits, **pipes)


def folder_argv(root, *argv):
    found = [*TINY, "--data.name", "folder", "--data.root", str(root), "--data.num_classes", "2", "--train.epochs", "1"]
    found += ["--data.batch_size", "4", "--data.num_workers", "1", "--run.dir", str(root), "--run.name", "a"]
    return [*found, *argv]


def test_full_shared_memory_ends_the_run_with_a_sentence(make_folder):  # noqa: F811
    """A limit on the size of files stands in for a small /dev/shm: a batch of 128 px does not fit in 100 kB."""
    root = make_folder(["cat", "dog"], 8, 2)
    size = ["--data.train_px", "128", "--data.eval_px", "128", "--data.eval_resize_px", "128"]
    child = start(root, *folder_argv(root, *size), limit=100_000)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 2 and "Traceback" not in errors
    assert "error: shared memory is full (" in errors and "docker run --shm-size" in errors
    assert "data.num_workers" in errors


STALLED = """
import multiprocessing, os, sys, time
sys.path.insert(0, os.getcwd())
import train
from mrl.data import folder
from mrl.training import logging

logging.SECONDS_TO_WAIT = 0.5

def decode(path, exif_rotation, real=folder.decode):
    if where == "worker" and multiprocessing.parent_process() is None:
        return real(path, exif_rotation)
    (folder_of_pids / str(os.getpid())).touch()
    time.sleep(1000)

from pathlib import Path
folder_of_pids, where = Path(sys.argv.pop(1)), sys.argv.pop(1)
folder.decode = decode
sys.exit(train.main())
"""


@pytest.mark.parametrize("how", ["sigterm", "ctrl_c", "kill_9_of_the_worker"])
def test_a_run_that_waits_for_data_in_vain_ends(make_folder, how):  # noqa: F811
    root = make_folder(["cat", "dog"], 8, 2)
    pids = root / "pids"
    pids.mkdir()
    (root / "stalled.py").write_text(STALLED)
    child = start(root, str(pids), "worker", *folder_argv(root), script=str(root / "stalled.py"))
    deadline = time.monotonic() + 60
    while not list(pids.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    [worker] = [int(path.name) for path in pids.iterdir()]
    begun = time.monotonic()
    if how == "kill_9_of_the_worker":
        os.kill(worker, signal.SIGKILL)
    else:
        child.send_signal(signal.SIGTERM if how == "sigterm" else signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert time.monotonic() - begun < 20 and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    if how == "kill_9_of_the_worker":
        assert child.returncode == 2
        assert "a worker process that reads images was killed, most often because the memory was full" in errors
    else:
        assert child.returncode == {"sigterm": 143, "ctrl_c": 130}[how]
        assert "interrupted; the last checkpoint, if there is one, is kept" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_whose_threads_wait_for_a_disk(make_folder, number):  # noqa: F811
    """The memory backend decodes in threads before the training."""
    root = make_folder(["cat", "dog"], 8, 2)
    pids = root / "pids"
    pids.mkdir()
    stalled = STALLED.replace("folder.decode = decode", "from mrl.data import memory\nmemory.decode = decode")
    (root / "stalled.py").write_text(stalled)
    argv = folder_argv(root, "--data.backend", "memory")
    child = start(root, str(pids), "main", *argv, script=str(root / "stalled.py"))
    deadline = time.monotonic() + 60
    while not list(pids.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    _, errors = child.communicate(timeout=15)
    assert "Traceback" not in errors and child.returncode == {signal.SIGTERM: -15, signal.SIGINT: 130}[number]


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
    assert train.main([*folder_argv("pets"), "--run.dir", str(root), "--data.num_workers", "0"]) == 0
    monkeypatch.chdir(elsewhere)

    def embed(*argv):
        process, args = Process(0, 1, torch.device("cpu")), evaluation.parse(["--runs", run_directory, *argv])
        [opened] = embed_runs({"a": root / "a"}, TransferImages(), 8, True, process, settings=args.settings)
        return opened

    capsys.readouterr()
    before = embed()
    assert f"run a: data.root 'pets' counts from the folder of its training: {pets}" in capsys.readouterr().out
    pets.rename(elsewhere / "cats and dogs")
    with pytest.raises(UserError, match=r"the images of run a are not at 'pets' \(seen from .*: --data\.root DIR"):
        embed()
    moved = embed("--data.root", "cats and dogs", "--data.num_workers", "1")
    assert torch.equal(torch.tensor(moved.train.vectors), torch.tensor(before.train.vectors))
    assert moved.source.dataset == "pets", "results keep the name of the data"
    assert moved.images("val", [0]).shape == (1, 3, 32, 32)
    assert open_run(root / "a", "cats and dogs").images("val", [0]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("argv", [["--data.batch_size", "4"], ["DIR"], ["--optim.lr", "1"]])
def test_an_evaluation_takes_no_other_setting_of_a_run(argv, capsys):
    with pytest.raises(SystemExit):
        evaluation.parse(["--runs", "runs/a", *(["--wandb", "offline"] if argv == ["DIR"] else []), *argv])
    assert f"unrecognized arguments: {' '.join(argv)}" in capsys.readouterr().err


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
