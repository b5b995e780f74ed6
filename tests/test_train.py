"""The loop end to end, on handwritten digits and models small enough to train in seconds."""

import gzip
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchcodec.encoders import PngEncoder

import mrl
import train
from mrl import rundir
from mrl.distributed import Process
from mrl.training.logging import Tracker

REPOSITORY = Path(train.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
TIMES = {"images_per_second", "data_wait"}
# A ViT of one block, 32 wide: no BatchNorm, so that any number of processes computes the same.
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "dynamic_img_size": True}
SMALL = {"channels": [8, 16, 32, 64], "stem_width": 8}  # a narrow ResNet
TINY = [
    *("--config", "digits_mrl.yaml", "--train.precision", "fp32", "--train.epochs", "2", "--data.batch_size", "256"),
    *("--train.log_every_steps", "2", "--optim.warmup_epochs", "0.5", "--optim.name", "adamw", "--optim.lr", "0.01"),
    *("--model.backbone", "vit_tiny_patch16_224", "--model.kwargs", json.dumps(VIT), "--head.nesting_list", "auto"),
]
# BatchNorm, EMA, erasing, mixup, accumulation, clipping, drop path, a rate per layer: all a resumed run could forget.
EVERYTHING = [
    *("--config", "digits_mrl_e.yaml", "--train.precision", "fp32", "--train.epochs", "2", "--data.batch_size", "256"),
    *("--train.log_every_steps", "3", "--train.ema_decay", "0.8", "--train.accumulation_steps", "2"),
    *("--data.mixup", "0.4", "--data.cutmix", "1.0", "--optim.clip_norm", "1.0", "--data.train_px", "[[0,32],[1,40]]"),
    *("--data.random_erasing", "0.5", "--optim.layer_decay", "0.8"),
    *("--model.kwargs", json.dumps({**SMALL, "drop_path_rate": 0.2}), "--head.nesting_list", "auto"),
    *("--head.scaled", "true"),
]
STEPS = 10  # 2 epochs of 5 steps


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu():
    """Bits are promised on the CPU only, and for one number of threads: a forked process has one, so all have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")  # of the children
        yield
    torch.set_num_threads(threads)


def run(directory, *argv, name="a"):
    return train.main([*argv, "--run.dir", str(directory), "--run.name", name])


def torchrun_two(directory, *argv, name="a"):
    command = [*TORCHRUN, "train.py", *argv, "--run.dir", str(directory), "--run.name", name]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def fork(log, function, *arguments):
    """Start ``function(*arguments)`` in a process, without the seconds that a new Python imports for.

    What it returns is the exit status; what it prints goes to the file ``log``.
    """

    def work():
        torch.set_num_threads(1)
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        try:
            status = function(*arguments)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status or 0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def fork_two(folder, function, *arguments):
    """Run ``function(rank, *arguments)`` in two processes; return their exit statuses and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        return function(rank, *arguments)

    logs = [folder / f"log{rank}" for rank in (0, 1)]
    processes = [fork(log, work, rank) for rank, log in enumerate(logs)]
    for process in processes:
        process.join(timeout=300)
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


def run_two(directory, *argv, name="a", stop_after=None):
    """Train in two processes; process 1 gets SIGTERM after ``stop_after`` steps. Return what the main one printed."""

    def work(rank):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1 and stop_after is not None:
                stop_at(patch, stop_after, signal.SIGTERM)
            return run(directory, *argv, name=name)

    statuses, (printed, other) = fork_two(directory, work)
    assert set(statuses) == {0 if stop_after is None else 128 + signal.SIGTERM}, printed + other
    return printed


def stop_at(patch, steps, number):
    """Send this process a signal when so many steps are done."""
    advance, done = Tracker.advance, []

    def advance_and_stop(self):
        advance(self)
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), number)

    patch.setattr(Tracker, "advance", advance_and_stop)


def rows(directory, name="a"):
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


def untimed(directory, name="a"):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(directory, name)]


def weights(directory, name="a"):
    return load_file(directory / name / "model.safetensors")


def checkpoint(directory, name="a"):
    return (directory / name / "checkpoints" / "last.pt").read_bytes()


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def assert_same_runs(directory, left, right):
    assert_same(weights(directory, left), weights(directory, right))
    assert untimed(directory, left) == untimed(directory, right)


def run_until(steps, directory, *argv, name="a", number=signal.SIGTERM):
    """Run until so many steps are done, and a signal."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, steps, number)
        assert run(directory, *argv, name=name) == 128 + number


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a finished run "a", which no test changes."""
    folder = tmp_path_factory.mktemp("straight")
    assert run(folder, *TINY) == 0
    return folder


@pytest.fixture(scope="module")
def _stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    run_until(2, folder, *TINY)
    return folder


@pytest.fixture
def stopped(_stopped, tmp_path):
    """The folder of a run "a" that was stopped after two steps."""
    shutil.copytree(_stopped / "a", tmp_path / "a")
    return tmp_path


@pytest.fixture
def make_folder(tmp_path):
    def make(classes, num_train, num_val):
        for split, count in (("train", num_train), ("val", num_val)):
            for name in classes:
                (tmp_path / split / name).mkdir(parents=True)
                for i in range(count):
                    image = torch.randint(256, (3, 40, 48), dtype=torch.uint8)
                    PngEncoder(image).to_file(str(tmp_path / split / name / f"{i}.png"))
        return tmp_path

    return make


def test_a_run_fills_its_directory_and_the_model_loads(straight):
    found = sorted(str(path.relative_to(straight / "a")) for path in (straight / "a").rglob("*") if path.is_file())
    written = "checkpoints/last.pt config.yaml metrics.jsonl model.json model.safetensors provenance.json"
    assert found == written.split()
    model, dims = mrl.load(straight / "a"), [8, 16, 32]
    assert list(model.head.nesting_list) == dims
    assert model.encode(torch.zeros(2, 3, 32, 32), dim=16).shape == (2, 16)

    training = [row for row in rows(straight) if "lr" in row]
    validation = [row for row in rows(straight) if "top_1/8" in row]
    assert [row["step"] for row in training] == [2, 4, 5, 6, 8, 10]
    assert [row["step"] for row in validation] == [5, 10]
    images = train.build_data(train.parse_command_line(TINY, "").data, 0, torch.device("cpu"), False)["val"]
    with torch.no_grad():
        correct = [int(model(x)[-1].argmax(-1)) == int(y) for x, y in images.eval_batches([[i] for i in range(355)])]
    assert validation[-1]["top_1/32"] == pytest.approx(sum(correct) / len(images), abs=1e-9)
    keys = {"step", "epoch", "lr"} | TIMES | {f"{k}/{d}" for k in ("loss", "train_top_1") for d in dims}
    assert set(training[0]) == keys
    assert set(validation[0]) == {"step", "epoch"} | {f"{k}/{d}" for k in ("top_1", "val_loss") for d in dims}
    assert training[-1]["loss/32"] < training[0]["loss/32"]
    (start,) = json.loads((straight / "a" / "provenance.json").read_text())
    assert (start["start_step"], start["world_size"], start["micro_batch_size"]) == (0, 1, 256)


def test_fault_23_a_stopped_and_resumed_run_equals_the_straight_one_bitwise(tmp_path, capsys):
    """Stopped in mid-epoch, at an epoch's end, and again in mid-epoch."""
    assert run(tmp_path, *EVERYTHING) == 0
    argv = [*EVERYTHING, "--run.resume", "auto"]
    for steps, step, number in ((2, 2, signal.SIGTERM), (3, 5, signal.SIGINT), (2, 7, signal.SIGTERM)):
        run_until(steps, tmp_path, *argv, name="b", number=number)
        assert f"saved after step {step}" in capsys.readouterr().out
        # A stop at the end of an epoch leaves its validation to the resumed run.
        assert [row["step"] for row in rows(tmp_path, "b") if "top_1/8" in row] == ([5] if step > 5 else [])
        torch.manual_seed(12345)  # the state of the generators must not matter
    assert run(tmp_path, *argv, name="b") == 0
    assert_same_runs(tmp_path, "a", "b")
    starts = json.loads((tmp_path / "b" / "provenance.json").read_text())
    assert [start["start_step"] for start in starts] == [0, 2, 5, 7]


def test_kill_9_then_resume_equals_the_straight_run(straight, tmp_path):
    argv = [*TINY, "--train.checkpoint_minutes", "0", "--run.resume", "auto"]
    child = fork(tmp_path / "log", run, tmp_path, *argv)
    deadline = time.monotonic() + 120
    while not (tmp_path / "a" / "checkpoints" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert run(tmp_path, *argv) == 0
    assert_same(weights(straight), weights(tmp_path))
    assert untimed(straight) == untimed(tmp_path)


def test_two_processes_equal_one_also_when_they_take_over_in_mid_epoch(tmp_path):
    """Sample order and crops do not depend on the number of processes (BatchNorm-free model)."""
    argv = [*TINY, "--train.log_every_steps", "1"]
    assert run(tmp_path, *argv) == 0
    run_until(3, tmp_path, *argv, name="b")
    run_two(tmp_path, *argv, "--run.resume", "auto", name="b")
    one, two = untimed(tmp_path, "a"), untimed(tmp_path, "b")
    assert len(one) == len(two) == STEPS + 2
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            # Every validation image is counted once on two processes too, so accuracies are equal as counts.
            assert left[key] == pytest.approx(right[key], rel=2e-4 if "loss" in key else 1e-2), key

    config = train.parse_command_line(argv, "")
    images = train.build_data(config.data, 0, torch.device("cpu"), False)["val"]
    assert len(images) % 2, "the processes had unequal shares"
    alone = Process(rank=0, world_size=1, device=torch.device("cpu"))
    scores = train.validate(mrl.load(tmp_path / "b"), images, 256, alone, torch.autocast("cpu", enabled=False))
    for key in scores:
        assert scores[key] == (two[-1][key] if "top_1" in key else pytest.approx(two[-1][key], rel=1e-5)), key

    starts = json.loads((tmp_path / "b" / "provenance.json").read_text())
    assert [(start["world_size"], start["micro_batch_size"]) for start in starts] == [(1, 256), (2, 128)]


def test_two_processes_stop_at_the_step_of_a_signal_to_one_and_resume_bitwise(tmp_path):
    argv = [*TINY, "--data.batch_size", "64", "--train.epochs", "1", "--run.resume", "auto"]
    argv += ["--train.log_every_steps", "4"]  # sums of two steps are in the checkpoint
    run_two(tmp_path, *argv)
    assert "stopped by SIGTERM, saved after step 3;" in run_two(tmp_path, *argv, name="b", stop_after=3)
    run_two(tmp_path, *argv, name="b")
    assert_same_runs(tmp_path, "a", "b")


def not_finite(*args):
    return torch.nn.functional.cross_entropy(args[0][0], args[1]) * torch.tensor([1.0, float("nan"), 1.0])


def out_of_memory(*args):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")


def interrupted(*args, **rest):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "function", "status", "message"),
    [
        ("nested_cross_entropy", not_finite, 2, r"loss at step 2 is not finite for prefix sizes \[16\].*--optim.lr"),
        (
            "nested_cross_entropy",
            out_of_memory,
            2,
            r"error: a GPU ran out of memory \(CUDA out of memory\) on up to 256 images at a time; raise .*"
            "train.accumulation_steps, now 1.*data.batch_size, now 256.*data.train_px, now 32",
        ),
        ("build_data", interrupted, 130, "interrupted; the last checkpoint, if there is one, is kept"),
    ],
    ids=["fault_09_non_finite_loss", "full GPU", "Ctrl-C at the start"],
)
def test_a_resumed_run_that_ends_keeps_its_checkpoint_and_goes_on(
    stopped, monkeypatch, capsys, name, function, status, message
):
    before = checkpoint(stopped)
    with monkeypatch.context() as patch:
        patch.setattr(train, name, function)
        assert run(stopped, *TINY, "--run.resume", "auto") == status
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert checkpoint(stopped) == before
    assert run(stopped, *TINY, "--run.resume", "auto", "--train.accumulation_steps", "2") == 0


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys):
    """The loss of the step that broke them was finite."""
    monkeypatch.setattr(train, "lr_at", lambda step, *_: [0.1, float("inf")][step])
    one_step_an_epoch = ["--data.batch_size", "1442", "--data.min_steps_per_epoch", "1", "--train.epochs", "2"]
    assert run(tmp_path, "--config", "digits_mrl.yaml", *one_step_an_epoch) == 2
    assert "the weights after step 2 are not finite; the last checkpoint is kept" in capsys.readouterr().err
    assert rundir.load_checkpoint(tmp_path / "a")["step"] == 1


def test_other_data_is_refused_when_a_run_resumes(stopped, monkeypatch, capsys):
    build = train.build_data

    def fewer(*args, **rest):
        images = build(*args, **rest)
        monkeypatch.setattr(type(images["train"]), "__len__", lambda self: 1400)
        return images

    monkeypatch.setattr(train, "build_data", fewer)
    assert run(stopped, *TINY, "--run.resume", "auto") == 2
    error = capsys.readouterr().err
    assert "was trained on 1,442 images of 10 classes" in error and "now there are 1,400 images" in error


def test_a_run_directory_among_the_classes_is_refused(make_folder, monkeypatch, capsys):
    root = make_folder(["cat", "dog"], 4, 1) / "train"
    argv = ["--config", "finetune_mrl_cpu.yaml", "--data.root", str(root), "--run.dir", str(root / "runs")]
    assert train.main(argv) == 2
    assert "runs'; allowed: outside data.root, whose folders are the classes" in capsys.readouterr().err
    assert not (root / "runs").exists()
    monkeypatch.chdir(root)
    assert train.main(["--config", "finetune_mrl_cpu.yaml"]) == 2
    assert "data.root is not given" in capsys.readouterr().err


def test_the_imagenet_recipe_trains_on_a_folder_with_two_processes(make_folder):
    """BatchNorm, BlurPool, accumulation, EMA, augmentation, clipping, loader processes and a profile."""
    root = make_folder(["n02084071", "n02121808"], 12, 3)
    argv = ["--config", "resnet50_mrl.yaml", "--data.root", str(root), "--model.backbone", "resnet10t"]
    argv += ["--data.batch_size", "8", "--train.accumulation_steps", "2", "--data.train_px", "[[0,32],[1,48]]"]
    argv += ["--data.eval_resize_px", "36", "--data.eval_px", "32", "--train.epochs", "2", "--data.mixup", "0.2"]
    argv += ["--optim.warmup_epochs", "1", "--data.rand_augment", "rand-m9-mstd0.5-inc1"]
    argv += ["--data.random_erasing", "0.25", "--train.gradient_precision", "bf16", "--train.profile_steps", "2"]
    argv += ["--train.ema_decay", "0.5", "--optim.clip_norm", "1", "--data.num_workers", "1"]
    printed = run_two(root, *argv)
    assert "8 images a step = 2 processes x 2 micro-batches x 2" in printed
    assert [row["step"] for row in rows(root) if "top_1/8" in row] == [3, 6]
    assert mrl.load(root / "a").width == 512
    assert printed.count("profile: ") == 1
    trace = gzip.decompress((root / "a" / "trace.json.gz").read_bytes())
    assert b"all_reduce" in trace
    assert all(f'"{part}"'.encode() in trace for part in ("data wait", "forward", "backward", "optimizer"))


def test_the_scores_of_two_processes_are_those_of_the_saved_model_with_its_batchnorms(tmp_path):
    """Each process has seen other images."""
    argv = ["--config", "digits_mrl.yaml", "--train.epochs", "1"]
    run_two(tmp_path, *argv)
    alone = Process(rank=0, world_size=1, device=torch.device("cpu"))
    images = train.build_data(train.parse_command_line(argv, "").data, 0, alone.device, False)["val"]
    scores = train.validate(mrl.load(tmp_path / "a"), images, 32, alone, torch.autocast("cpu", enabled=False))
    assert scores == pytest.approx({key: rows(tmp_path)[-1][key] for key in scores}, rel=1e-4)


@pytest.mark.parametrize(
    "setting",
    [
        "train.label_smoothing=0.5",
        "optim.schedule=cosine",
        "optim.clip_norm=0.01",
        "optim.weight_decay=0.9",
        "train.precision=bf16",
    ],
)
def test_a_setting_of_the_optimization_reaches_the_loop(straight, tmp_path, setting):
    assert run(tmp_path, *TINY, f"--{setting}") == 0
    name = "head.classifiers.0.weight"
    assert not torch.equal(weights(tmp_path)[name], weights(straight)[name])


@pytest.mark.parametrize(("minutes", "steps"), [("0", [1, 2, 3, 4, 5]), ("15", [5])])
def test_checkpoints_are_written_by_the_clock_and_at_the_end_of_an_epoch(tmp_path, monkeypatch, minutes, steps):
    saved, save = [], rundir.save_checkpoint
    monkeypatch.setattr(rundir, "save_checkpoint", lambda at, state: saved.append(state["step"]) or save(at, state))
    assert run(tmp_path, *TINY, "--train.epochs", "1", "--train.checkpoint_minutes", minutes) == 0
    assert saved == steps


def test_half_precision_trains_and_resumes(tmp_path):
    """Loss scaling with clipping and accumulation; the same bits after a stop."""
    argv = [*TINY, "--train.precision", "fp16", "--optim.clip_norm", "1", "--train.accumulation_steps", "2"]
    argv += ["--train.eval_every_epochs", "2"]
    assert run(tmp_path, *argv) == 0
    run_until(3, tmp_path, *argv, name="b")
    assert run(tmp_path, *argv, "--run.resume", "auto", name="b") == 0
    assert_same(weights(tmp_path, "a"), weights(tmp_path, "b"))
    assert rows(tmp_path)[-2]["loss/32"] < rows(tmp_path)[0]["loss/32"]
    assert [row["step"] for row in rows(tmp_path) if "top_1/8" in row] == [10]


def test_unreadable_images_are_left_out_and_listed_in_the_run_directory(make_folder):
    root = make_folder(["cat", "dog"], 8, 4)
    for split in ("train", "val"):
        (root / split / "dog").rename(root / split / os.fsdecode(b"ch\xe2t"))
    for name in ("train/cat/7.png", "val/cat/1.png"):
        (root / name).write_bytes(b"no image")
    argv = [*TINY, "--data.name", "folder", "--data.root", str(root), "--data.num_classes", "2"]
    argv += ["--data.batch_size", "4", "--data.num_workers", "0", "--data.max_unreadable", "0.2"]
    assert run(root, *argv) == 0
    lines = (root / "a" / "unreadable.txt").read_text().splitlines()
    assert [line.split(" cannot be read")[0] for line in lines] == [f"{root}/train/cat/7.png", f"{root}/val/cat/1.png"]
    about = mrl.load(root / "a").info
    assert about.classes == ("cat", "ch\\xe2t") and about.exif_rotation == "apply"


def test_an_existing_run_is_refused_and_a_finished_one_is_left_alone(straight, capsys):
    before = weights(straight)
    assert run(straight, *TINY) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run(straight, *TINY, "--run.resume", "auto", "--optim.lr", "0.5") == 2
    assert "optim.lr was 0.01, now 0.5" in capsys.readouterr().err
    assert run(straight, *TINY, "--run.resume", "auto") == 0
    assert_same(weights(straight), before)


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    assert run(tmp_path, *TINY, "--train.epochs", "1") == 0
    assert run(tmp_path, *TINY, "--train.epochs", "1", "--train.accumulation_steps", "4", name="b") == 0
    for left, right in zip(untimed(tmp_path, "a"), untimed(tmp_path, "b"), strict=True):
        assert left == pytest.approx(right, rel=2e-3)


def test_loss_weights_reach_the_loop(tmp_path):
    """With all weight on the smallest prefix, the other classifiers stay where they began."""
    argv = ["--head.weights", "[1, 0, 0]", "--train.epochs", "1", "--optim.weight_decay", "0"]
    assert run(tmp_path, *TINY, *argv) == 0
    config = train.parse_command_line([*TINY, *argv], "")
    torch.manual_seed(0)
    begun = train.make_model(config, 10).state_dict()
    trained = weights(tmp_path)
    assert not torch.equal(begun["head.classifiers.0.weight"], trained["head.classifiers.0.weight"])
    assert torch.equal(begun["head.classifiers.1.weight"], trained["head.classifiers.1.weight"])


def test_self_distillation_moves_the_smaller_prefixes_towards_the_largest(tmp_path):
    """On frozen embeddings the largest prefix, the teacher, learns as without it."""
    argv = [*TINY, "--model.trainable", "head", "--train.epochs", "1"]
    assert run(tmp_path, *argv) == run(tmp_path, *argv, "--head.self_distillation", "3", name="b") == 0
    without, distilled = weights(tmp_path), weights(tmp_path, "b")
    last = [f"head.classifiers.{g}.weight" for g in range(3)]
    assert [torch.equal(without[name], distilled[name]) for name in last] == [False, False, True]


def test_scales_of_the_prefixes_are_trained_and_saved(tmp_path):
    argv = [*TINY, "--head.tied", "true", "--train.epochs", "1"]
    assert run(tmp_path, *argv) == run(tmp_path, *argv, "--head.scaled", "true", name="b") == 0
    assert "head.log_scales" not in weights(tmp_path)
    assert weights(tmp_path, "b")["head.log_scales"].abs().min() > 0
    assert mrl.load(tmp_path / "b").head.scaled


def test_fault_24_a_model_that_does_not_compile_ends_the_run_with_the_way_out(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise torch._dynamo.exc.TorchDynamoException("no compiler here\nlong story")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", fail))
    assert run(tmp_path, *TINY, "--train.epochs", "1", "--train.compile", "true") == 2
    message = "error: torch.compile failed (no compiler here); train without it: --train.compile false\n"
    assert message in capsys.readouterr().err
    assert run(tmp_path, *TINY, "--train.epochs", "1", "--run.resume", "auto") == 0
