"""The frozen part of a network computed once: same training as without, one store for several runs."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mrl
import train
from mrl.config import parse_command_line
from mrl.distributed import Process
from mrl.engine import fast_forward
from mrl.errors import UserError
from mrl.model import build_backbone, build_model, freeze
from mrl.studies.run import embed_runs
from mrl.studies.transfer import TransferImages
from mrl.training.frozen import split_frozen
from mrl.training.optim import build_optimizer
from tests.test_train import stop_at

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
# Only the last block and the norm of a ViT are trained: no BatchNorm, whose rounding would grow step by step.
TAIL = [
    *("--config", "digits_mrl.yaml", "--train.precision", "fp32", "--train.epochs", "2", "--data.batch_size", "256"),
    *("--train.log_every_steps", "1", "--optim.warmup_epochs", "0.5", "--optim.lr", "0.05"),
    *("--model.backbone", "vit_tiny_patch16_224", "--model.kwargs", json.dumps(VIT), "--model.stem_stride", "4"),
    *("--model.trainable", "[blocks.1, norm]", "--head.nesting_list", "[8, 16, 32]"),
]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("mrl.engine.fast_forward", lambda module, *_: (module, "PyTorch"))  # no export


def run(directory, *argv, name):
    return train.main([*TAIL, *argv, "--run.dir", str(directory), "--run.name", name])


def losses(directory, name):
    lines = (directory / name / "metrics.jsonl").read_text().splitlines()
    found = [[value for key, value in json.loads(line).items() if "loss" in key] for line in lines]
    return np.array([row for row in found if row])


def stored(directory):
    return sorted(path.name for path in (directory / "trunk_cache").iterdir() if path.is_dir())


@pytest.mark.parametrize("with_onnx_runtime", [False, True])
def test_the_cache_changes_no_loss_and_the_saved_model_is_an_ordinary_one(tmp_path, monkeypatch, with_onnx_runtime):
    pytest.importorskip("onnxruntime" if with_onnx_runtime else "torch")
    pytest.importorskip("onnxscript" if with_onnx_runtime else "torch")
    if with_onnx_runtime:
        monkeypatch.setattr("mrl.engine.fast_forward", lambda module, images, _: fast_forward(module, images))
    assert run(tmp_path, name="plain") == run(tmp_path, "--train.cache_views", "2", name="cached") == 0
    np.testing.assert_allclose(losses(tmp_path, "cached"), losses(tmp_path, "plain"), atol=1e-5)
    plain, cached = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "cached"))
    assert plain.keys() == cached.keys()
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, atol=1e-4, rtol=1e-4)
    assert mrl.load(tmp_path / "cached").encode(torch.zeros(1, 3, 32, 32), dim=8).shape == (1, 8)


def test_runs_share_a_store_and_views_repeat(tmp_path, monkeypatch):
    assert run(tmp_path, "--train.cache_views", "1", "--train.cache_seed", "7", name="a") == 0
    first = stored(tmp_path)
    assert [name.rpartition("_")[0] for name in first] == ["train_view0", "val"], "epoch 1 reads view 0"
    monkeypatch.setattr("mrl.engine.fast_forward", lambda *_: pytest.fail("computed again"))
    argv = ["--train.cache_views", "1", "--train.cache_seed", "7", "--run.seed", "0", "--head.tied", "true"]
    assert run(tmp_path, *argv, name="b") == 0
    assert stored(tmp_path) == first


def test_a_store_of_other_weights_or_crops_is_not_used(tmp_path):
    argv = ["--train.cache_views", "1", "--train.epochs", "1", "--train.cache_seed", "0", "--model.kwargs"]
    argv += [json.dumps(VIT | {"dynamic_img_size": True})]
    before: set[str] = set()
    for number, (change, new) in enumerate(
        [
            ([], ["train_view0", "val"]),
            (["--data.crop_scale", "[0.5, 1.0]"], ["train_view0"]),  # other crops
            (["--run.seed", "1"], ["train_view0", "val"]),  # other frozen weights, as these are random
            (["--data.eval_px", "24"], ["train_view0", "val"]),
            (
                ["--model.kwargs", json.dumps(VIT | {"act_layer": "relu"})],
                ["train_view0", "val"],
            ),  # of the same weights
        ]
    ):
        assert run(tmp_path, *argv, *change, name=str(number)) == 0
        assert sorted(name.rpartition("_")[0] for name in set(stored(tmp_path)) - before) == new
        before = set(stored(tmp_path))


def test_a_killed_run_resumes_bitwise_without_the_weights_that_it_began_with(tmp_path, monkeypatch):
    init = tmp_path / "init.pt"
    torch.save(build_backbone("vit_tiny_patch16_224", kwargs=VIT).state_dict(), init)
    argv = ["--train.cache_views", "2", "--model.init", str(init)]
    assert run(tmp_path, *argv, name="whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGTERM)
        assert run(tmp_path, *argv, name="stopped") == 128 + signal.SIGTERM
    init.unlink()
    monkeypatch.setattr("mrl.engine.fast_forward", lambda *_: pytest.fail("computed again"))
    assert run(tmp_path, *argv, "--run.resume", "auto", name="stopped") == 0
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(
    ("backbone", "trainable"),
    [
        ("resnet10t", ["layer4"]),
        ("resnet10t", "head"),
        ("tf_efficientnet_lite0", ["blocks.6", "conv_head", "bn2"]),
        ("convnext_atto", ["stages.3", "head"]),
        ("vit_tiny_patch16_224", ["blocks.11", "norm"]),
        ("swin_tiny_patch4_window7_224", ["layers.3", "norm"]),
    ],
)
def test_trunk_and_tail_are_the_model(backbone, trainable, projection):
    model = build_model(build_backbone(backbone, projection=projection), 5)
    freeze(model, trainable)
    trunk, tail = split_frozen(model.train(), 224)
    assert model.training and tail.training and not trunk.training
    images = torch.randn(2, 3, 224, 224)
    model.eval(), tail.eval()
    with torch.no_grad():
        torch.testing.assert_close(tail(trunk.outputs(images)), model(images), atol=1e-4, rtol=1e-4)
    if trainable == "head":
        assert trunk.outputs(images).shape == (2, model.width), "the store holds pooled vectors"
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert wanted == {id(p) for p in tail.parameters()}  # shared, and not one frozen parameter is left


@pytest.mark.parametrize(
    ("backbone", "trainable", "message"),
    [
        ("resnet10t", ["conv1"], "needs frozen layers before"),
        ("resnet10t", ["layer3"], "layer4.0 of the backbone is frozen after the trainable layer3.0"),
        (
            "tf_efficientnet_lite0",
            ["blocks.6"],
            r"conv_head, bn2 of the backbone .*trainable '\[blocks.6.0, conv_head, bn2\]'",
        ),
        ("levit_128s", ["stages.2"], "do not run one after the other"),
    ],
)
def test_modules_that_are_no_suffix_are_refused(backbone, trainable, message):
    model = build_model(build_backbone(backbone), 5)
    freeze(model, trainable)
    with pytest.raises(UserError, match=message):
        split_frozen(model, 224)


@pytest.mark.parametrize("trainable", ["head", ["blocks.6", "conv_head", "bn2"]])
def test_the_tail_learns_at_the_rates_of_the_whole_model(trainable, caplog):
    model = build_model(build_backbone("tf_efficientnet_lite0"), 5)
    freeze(model, trainable)
    rates = []
    for part in (model, split_frozen(model, 64)[1]):
        groups = build_optimizer(part, "adamw", 0.1, 0.9, 0.05, layer_decay=0.1).param_groups
        rates.append({id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]})
    assert rates[0] == rates[1] and max(rates[0].values()) == 1
    assert (min(rates[0].values()) < 0.2) == (trainable != "head")
    assert not caplog.records  # timm would say that the decay has no effect


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.cache_views", "3"], r"train.cache_views is 3; allowed: 0 \(off\) to train.epochs = 2"),
        (["--train.cache_views", "1", "--model.trainable", "all"], "model.trainable is 'all'"),
        (["--train.cache_views", "1", "--data.mixup", "0.2"], "data.mixup is 0.2; allowed: 0 with train.cache_views"),
        (["--train.cache_views", "1", "--data.train_px", "[[0,32],[1,40]]"], "sizes that repeat with the views"),
    ],
)
def test_settings_that_a_cache_cannot_keep_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        parse_command_line([*TAIL, *argv], "")


def test_evaluation_reads_the_store_and_gives_the_embeddings_of_the_model(tmp_path):
    assert run(tmp_path, "--train.cache_views", "1", "--data.flip", "true", name="a") == 0
    process = Process(0, 1, torch.device("cpu"))
    [opened] = embed_runs({"a": tmp_path / "a"}, TransferImages(), 100, False, process)
    assert [name.rpartition("_")[0] for name in stored(tmp_path)] == ["train", "train_view0", "val", "val_flip"]
    images = opened.images("val", np.arange(355))
    with torch.no_grad():
        for flip, found in ((False, opened.val), (True, opened.val_flip)):
            expected = opened.model.embed(images.flip(3) if flip else images)
            np.testing.assert_allclose(found.vectors, expected.numpy(), atol=1e-4, rtol=1e-4)


def test_an_image_replaced_by_one_of_the_same_size_is_not_read_from_the_store(tmp_path):
    def write(split, name, value):
        path = tmp_path / "pets" / split / name / "0.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), value, np.uint8)).save(path)
        return path

    for split in ("train", "val"):
        write(split, "cat", 20)
        size = write(split, "dog", 200).stat().st_size
    argv = ["--data.name", "folder", "--data.root", str(tmp_path / "pets"), "--data.batch_size", "2"]
    argv += ["--data.eval_px", "32", "--data.eval_resize_px", "32", "--data.train_px", "32", "--data.num_classes", "2"]
    assert run(tmp_path, *argv, "--data.num_workers", "0", "--train.cache_views", "1", name="a") == 0

    def vectors(force):
        process = Process(0, 1, torch.device("cpu"))
        return embed_runs({"a": tmp_path / "a"}, TransferImages(), 2, force, process)[0].val.vectors.copy()

    before, number = vectors(force=False), len(stored(tmp_path))
    assert np.array_equal(vectors(force=True), before) and len(stored(tmp_path)) == number, "from the store"
    assert write("val", "cat", 200).stat().st_size == size
    after = vectors(force=True)
    assert np.array_equal(after[1], before[1]) and np.allclose(after[0], after[1]) and not np.allclose(*before)


def test_a_full_disk_is_one_sentence_and_the_pass_continues(tmp_path, monkeypatch, capsys):
    from mrl.retrieval import embeddings

    real = embeddings._Parts.append

    def fail(parts, first, vectors, calls=[]):  # noqa: B006
        calls.append(first)
        if len(calls) > 5:
            raise OSError(28, "No space left on device", str(parts.directory))
        real(parts, first, vectors)

    with monkeypatch.context() as patch:
        patch.setattr(embeddings._Parts, "append", fail)
        assert run(tmp_path, "--train.cache_views", "1", name="a") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert run(tmp_path, "--train.cache_views", "1", "--run.resume", "auto", name="a") == 0
