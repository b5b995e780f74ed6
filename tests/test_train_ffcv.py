"""train.py on a small folder in ImageNet's layout, through the folder and the ffcv backend."""

import json

import numpy as np
import pytest
import torch
from torchcodec.encoders import JpegEncoder

from mrl.data import write_ffcv
from tests.test_train import VIT, _on_the_cpu, assert_same_runs, run, run_two, run_until, untimed  # noqa: F401

pytestmark = pytest.mark.ffcv
WNIDS = ["n01440764", "n01443537", "n02099601"]
STEPS_PER_EPOCH, EPOCHS = 4, 2
# The ImageNet recipe but for the size of everything; no BatchNorm, so that processes compute the same.
ARGV = [
    *("--config", "resnet50_mrl.yaml", "--model.backbone", "vit_tiny_patch16_224", "--model.kwargs", json.dumps(VIT)),
    *("--model.blurpool", "false", "--head.nesting_list", "[8,16,32]", "--optim.lr", "0.05"),
    *("--data.batch_size", "8", "--data.train_px", "[[0,32],[1,48]]", "--data.eval_resize_px", "36"),
    *("--data.eval_px", "32", "--train.epochs", str(EPOCHS), "--optim.warmup_epochs", "0.5"),
    *("--train.precision", "fp32", "--train.log_every_steps", "1", "--data.num_workers", "1"),
]


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
                JpegEncoder(image).to_file(str(root / split / wnid / f"{wnid}_{number}.JPEG"))
        assert write_ffcv.main(["--root", str(root), "--split", split]) == 0
    return root


def argv(imagenet, backend, *rest):
    return [*ARGV, "--data.root", str(imagenet), "--data.backend", backend, *rest]


@pytest.mark.parametrize("backend", ["folder", "ffcv"])
def test_the_imagenet_recipe_trains_stops_and_resumes(tmp_path, imagenet, backend, capsys):
    """Interrupted once in mid-epoch: the same bits as the straight run, crops and all."""
    assert run(tmp_path, *argv(imagenet, backend)) == 0
    run_until(STEPS_PER_EPOCH + 1, tmp_path, *argv(imagenet, backend), name="b")
    assert run(tmp_path, *argv(imagenet, backend, "--run.resume", "auto"), name="b") == 0
    assert f"train 33 + val 7 images of 3 classes, {backend} backend" in capsys.readouterr().out
    assert_same_runs(tmp_path, "a", "b")
    scores = [row["top_1/32"] * 7 for row in untimed(tmp_path) if "top_1/32" in row]
    assert len(scores) == EPOCHS and scores == pytest.approx([round(score) for score in scores])
    assert json.loads((tmp_path / "a" / "model.json").read_text())["classes"] == WNIDS


def test_two_processes_take_over_with_the_same_backend_only(tmp_path, imagenet, capsys):
    assert run(tmp_path, *argv(imagenet, "ffcv")) == 0
    run_until(1, tmp_path, *argv(imagenet, "auto"), name="b")
    assert run(tmp_path, *argv(imagenet, "folder", "--run.resume", "auto"), name="b") == 2
    assert "--data.backend ffcv: other backends decode to other pixels" in capsys.readouterr().err
    run_two(tmp_path, *argv(imagenet, "ffcv", "--run.resume", "auto"), name="b")
    one, two = untimed(tmp_path, "a"), untimed(tmp_path, "b")
    assert len(one) == len(two) == (STEPS_PER_EPOCH + 1) * EPOCHS
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            assert left[key] == pytest.approx(right[key], rel=2e-4 if "loss" in key else 1e-6), key
