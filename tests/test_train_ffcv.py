"""train.py on a small folder in ImageNet's layout, through the folder and the ffcv backend."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchvision.io import write_jpeg

import train
from mrl.data import write_ffcv
from mrl.distributed import Process
from mrl.studies.run import embed_runs
from mrl.studies.transfer import TransferImages
from mrl.training.logging import Tracker

pytestmark = pytest.mark.ffcv
REPOSITORY = Path(train.__file__).parent
WNIDS = ["n01440764", "n01443537", "n02099601"]
STEPS_PER_EPOCH, EPOCHS = 4, 2
# The ImageNet recipe but for the size of everything; no BatchNorm, so that processes compute the same.
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "dynamic_img_size": True}
WORDS = [
    *("--config", "resnet50_mrl.yaml", "--model.backbone", "vit_tiny_patch16_224", "--model.kwargs", json.dumps(VIT)),
    *("--model.blurpool", "false", "--head.nesting_list", "[8,16,32]", "--optim.lr", "0.05"),
    *("--data.batch_size", "8", "--data.train_px", "[[0,32],[1,48]]", "--data.eval_resize_px", "36"),
    *("--data.eval_px", "32", "--train.epochs", str(EPOCHS), "--optim.warmup_epochs", "0.5"),
    *("--train.precision", "fp32", "--train.log_every_steps", "1", "--data.num_workers", "1"),
]
TIMES = {"images_per_second", "data_wait"}


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """3 classes, 33 training and 7 validation photographs of many sizes, as files and as .beton."""
    root, generator = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, counts in (("train", (11, 11, 11)), ("val", (2, 2, 3))):
        for wnid, count in zip(WNIDS, counts, strict=True):
            (root / split / wnid).mkdir(parents=True)
            for number in range(count):
                size = generator.integers(40, 70, 2).tolist()
                coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, 5, 5)))
                image = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0].to(torch.uint8)
                write_jpeg(image, str(root / split / wnid / f"{wnid}_{number}.JPEG"))
        assert write_ffcv.main(["--root", str(root), "--split", split]) == 0
    return root


def run(directory, imagenet, backend, *words, name):
    where = ["--data.root", str(imagenet), "--data.backend", backend, "--run.dir", str(directory), "--run.name", name]
    return train.main([*WORDS, *where, *words])


def rows(directory, name):
    lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def stop_after(monkeypatch, step):
    """Send this process SIGTERM when a given step is done."""
    advance, done = Tracker.advance, []

    def advance_and_stop(self):
        advance(self)
        done.append(1)
        if len(done) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tracker, "advance", advance_and_stop)


@pytest.mark.parametrize("backend", ["folder", "ffcv"])
def test_the_imagenet_recipe_trains_stops_resumes_and_is_evaluated(tmp_path, imagenet, backend, monkeypatch, capsys):
    """Interrupted once in mid-epoch: the same bits as the straight run, crops and all."""
    assert run(tmp_path, imagenet, backend, name="straight") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, STEPS_PER_EPOCH + 1)
        assert run(tmp_path, imagenet, backend, name="resumed") == 128 + signal.SIGTERM
    assert run(tmp_path, imagenet, backend, "--run.resume", "auto", name="resumed") == 0
    assert f"train 33 + val 7 images of 3 classes, {backend} backend" in capsys.readouterr().out
    assert rows(tmp_path, "straight") == rows(tmp_path, "resumed")
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[key], resumed[key]) for key in straight)
    scores = [row["top_1/32"] * 7 for row in rows(tmp_path, "straight") if "top_1/32" in row]
    assert len(scores) == EPOCHS and scores == pytest.approx([round(score) for score in scores])
    assert json.loads((tmp_path / "straight" / "model.json").read_text())["classes"] == WNIDS


def test_a_run_goes_on_by_the_backend_that_it_began_with(tmp_path, imagenet, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run(tmp_path, imagenet, "auto", name="a") == 128 + signal.SIGTERM
    assert run(tmp_path, imagenet, "folder", "--run.resume", "auto", name="a") == 2
    assert "by the ffcv backend, whose pixels differ from those of folder; go on with --data.backend ffcv" in (
        capsys.readouterr().err
    )
    assert run(tmp_path, imagenet, "ffcv", "--run.resume", "auto", name="a") == 0


def test_two_processes_take_over_in_mid_epoch_and_count_every_validation_image_once(tmp_path, imagenet, monkeypatch):
    assert run(tmp_path, imagenet, "ffcv", name="one") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run(tmp_path, imagenet, "ffcv", name="two") == 128 + signal.SIGTERM
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    words = [*WORDS, "--data.root", str(imagenet), "--data.backend", "ffcv", "--run.resume", "auto"]
    result = subprocess.run(
        [*torchrun, "train.py", *words, "--run.dir", str(tmp_path), "--run.name", "two"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    one, two = rows(tmp_path, "one"), rows(tmp_path, "two")
    assert len(one) == len(two) == (STEPS_PER_EPOCH + 1) * EPOCHS
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            assert left[key] == pytest.approx(right[key], rel=2e-4 if "loss" in key else 1e-6), key


def test_both_backends_give_the_same_validation_embeddings(tmp_path, imagenet, capsys):
    assert run(tmp_path, imagenet, "folder", "--train.epochs", "1", name="a") == 0
    sets = {}
    for backend in ("folder", "ffcv"):
        config = tmp_path / "a" / "config.yaml"
        config.write_text(config.read_text().replace("backend: folder", f"backend: {backend}"))
        (embedded,) = embed_runs({"a": tmp_path / "a"}, TransferImages(), 4, True, Process(0, 1, torch.device("cpu")))
        assert f"{backend} backend" in capsys.readouterr().out
        sets[backend] = {name: np.array(getattr(embedded, name).vectors) for name in ("train", "val", "val_flip")}
    folder, ffcv = sets["folder"], sets["ffcv"]
    assert np.array_equal(folder["val"], ffcv["val"]) and ffcv["val"].shape == (7, 32)
    assert np.array_equal(folder["val_flip"], ffcv["val_flip"])
    assert not np.array_equal(folder["train"], ffcv["train"])  # half of which are JPEGs of JPEGs
