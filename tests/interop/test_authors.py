"""Checkpoints in the authors' format, built here by name and shape, against a forward pass written out here."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import eval as script  # not `eval`, which is Python's own
import mrl
from mrl.config import read_config
from mrl.errors import UserError
from mrl.interop import authors as raivn
from mrl.interop.authors import load_checkpoint
from mrl.results import read_rows

DIMS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
STRIDED = [f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv2", "downsample.0")]
KERNEL = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16


def linear(stem, dim):
    return {f"fc.{stem}weight": torch.randn(1000, dim) / dim**0.5, f"fc.{stem}bias": torch.randn(1000)}


def heads(kind):
    """The authors' names and shapes below ``fc.``, by kind of model."""
    match kind:
        case "mrl":
            return {k: v for i, dim in enumerate(DIMS) for k, v in linear(f"nesting_classifier_{i}.", dim).items()}
        case "mrl_e":
            return linear("nesting_classifier_0.", 2048)
        case "old_mrl_e" | "ff2048":
            return linear("", 2048)
        case "ff64":
            return linear("", 64)


@pytest.fixture(scope="module")
def resnet():
    """torchvision's ResNet-50 without its classifier; BatchNorms with their own weights and statistics of images."""
    torch.manual_seed(1)
    model = torchvision.models.resnet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    return {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}


def published(resnet, kind, blurpool=True, prefix="module."):
    """A state dict as the authors save it."""
    state = {}
    for key, value in resnet.items():
        module = key.removesuffix(".weight")
        if blurpool and module in STRIDED:
            state[f"{module}.blur_filter"] = KERNEL.expand(value.shape[1], 1, 3, 3).clone()
            key = f"{module}.conv.weight"
        state[key] = value
    return {prefix + key: value for key, value in (state | heads(kind)).items()}


def hollow(state):
    """The same names and shapes, of one stored number each: a small file. Blurs are as they are."""
    return {k: v if k.endswith("blur_filter") else v.new_zeros(()).expand(v.shape) for k, v in state.items()}


def conv(state, name, x, stride=1, padding=0):
    """The convolution ``name``, after a blur of every channel where the state holds one."""
    if f"{name}.blur_filter" in state:
        padded = F.pad(x, (1, 1, 1, 1))
        height, width = x.shape[2:]
        x = sum(KERNEL[i, j] * padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3))
        name += ".conv"
    return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)


def norm(state, name, x):
    mean, variance, weight, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def embed(state, x):
    """ResNet-50 (strides in the 3x3 convolutions) from images to pooled features, by the names in the state."""
    x = F.relu(norm(state, "bn1", conv(state, "conv1", x, 2, 3)))
    x = F.max_pool2d(x, 3, 2, 1)
    for i, num_blocks in enumerate((3, 4, 6, 3), start=1):
        for j in range(num_blocks):
            name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = F.relu(norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x)))
            y = F.relu(norm(state, f"{name}.bn2", conv(state, f"{name}.conv2", y, stride, 1)))
            y = norm(state, f"{name}.bn3", conv(state, f"{name}.conv3", y))
            if j == 0:
                x = norm(state, f"{name}.downsample.1", conv(state, f"{name}.downsample.0", x, stride))
            x = F.relu(x + y)
    return x.mean((2, 3))


def classify(state, kind, z):
    """Their logits by size: a classifier each, or the first columns of one with all of its bias."""
    if kind == "mrl":
        stems = [f"fc.nesting_classifier_{i}." for i in range(len(DIMS))]
        return {d: z[:, :d] @ state[f"{s}weight"].T + state[f"{s}bias"] for d, s in zip(DIMS, stems, strict=True)}
    stem = "fc.nesting_classifier_0." if kind == "mrl_e" else "fc."
    weight, bias = state[f"{stem}weight"], state[f"{stem}bias"]
    dims = DIMS if kind.endswith("mrl_e") else [weight.shape[1]]
    return {d: z[:, :d] @ weight[:, :d].T + bias for d in dims}


@pytest.mark.parametrize(
    ("kind", "name", "blurpool", "prefix"),
    [
        ("mrl", "r50_mrl1_e0_ff2048", True, "module."),
        ("mrl", "final_weights", False, ""),
        ("mrl_e", "final_weights", True, "module."),
        ("old_mrl_e", "r50_mrl1_e1_ff2048", True, "module."),
        ("ff2048", "r50_mrl0_e0_ff2048", True, ""),
        ("ff64", "r50_mrl0_e0_ff64", True, "module."),
    ],
)
def test_logits_and_embeddings_are_those_of_the_forward_pass_written_out(
    resnet, tmp_path, kind, name, blurpool, prefix
):
    state = published(resnet, kind, blurpool, prefix)
    torch.save(state, tmp_path / f"{name}.pt")
    model = mrl.load(tmp_path / f"{name}.pt", format="raivn")
    images = torch.randn(2, 3, 64, 80)
    plain = {key.removeprefix(prefix): value for key, value in state.items()}
    with torch.no_grad():
        expected_z = embed(plain, images)
        expected = classify(plain, kind, expected_z)
        z, logits = model.embed(images), model(images)
    assert not model.training
    assert list(model.head.nesting_list) == list(expected)
    assert model.head.tied == kind.endswith("mrl_e")
    assert expected_z.std() > 0.01
    torch.testing.assert_close(z, expected_z, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, torch.stack(list(expected.values())), rtol=1e-3, atol=1e-3)


def test_only_the_six_blurs_are_left_out_and_nothing_is_missing(resnet, tmp_path):
    state = published(resnet, "mrl", prefix="")
    torch.save(state, tmp_path / "a.pt")
    ours = mrl.load(tmp_path / "a.pt", format="raivn").state_dict()
    blurs = {key for key in state if key.endswith("blur_filter")}
    assert len(blurs) == 6
    assert len(ours) == len(state) - 6
    backbone = {key.removeprefix("backbone.") for key in ours if key.startswith("backbone.")}
    theirs = {key.replace(".conv.", ".") for key in state if not key.startswith("fc.")} - blurs
    assert backbone == theirs
    head = {key for key in ours if key.startswith("head.")}
    assert head == {f"head.classifiers.{i}.{part}" for i in range(9) for part in ("weight", "bias")}


def test_what_the_file_cannot_say_is_asked_for_and_may_be_said(resnet, tmp_path):
    path = tmp_path / "final_weights.pt"
    torch.save(hollow(published(resnet, "ff2048")), path)
    with pytest.raises(UserError, match=r"FF-2048 or MRL-E.*load_checkpoint, nesting_list=\[2048\] or tied=True"):
        mrl.load(path, format="raivn")
    for words, dims, tied in [
        ({"nesting_list": [2048]}, [2048], False),
        ({"tied": False}, [2048], False),
        ({"tied": True}, DIMS, True),
        ({"tied": True, "nesting_list": DIMS[1:]}, DIMS[1:], True),
    ]:
        model = load_checkpoint(path, **words)
        assert (list(model.head.nesting_list), model.head.tied) == (dims, tied)
    torch.save(hollow(published(resnet, "mrl")), path)
    for words in ({"tied": True}, {"nesting_list": [2048]}):
        with pytest.raises(UserError, match=r"said to be.*holds nesting_list \[8, 16.*tied False"):
            load_checkpoint(path, **words)


def test_the_model_knows_its_classes_and_its_transform(resnet, tmp_path):
    torch.save(published(resnet, "ff64"), tmp_path / "a.pt")
    model = mrl.load(tmp_path / "a.pt", format="raivn")
    classes = model.info.classes
    assert len(set(classes)) == 1000 and list(classes) == sorted(classes)
    # Tench, goldfish, ..., toilet tissue: torchvision's names stand in the order that the authors trained with.
    assert (classes[0], classes[1], classes[999]) == ("n01440764", "n01443537", "n15075141")
    assert (model.info.resize_px, model.info.crop_px) == (256, 224)
    assert model.preprocess(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape == (3, 224, 224)
    assert model.encode(torch.zeros(1, 3, 32, 32), dim=64).norm().item() == pytest.approx(1)


def drop(name):
    return lambda state: {key: value for key, value in state.items() if key != f"module.{name}"}


def change(name, value):
    return lambda state: state | {f"module.{name}": value}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop("layer3.1.conv1.weight"), r"lacks 1 entries.*layer3\.1\.conv1\.weight"),
        (drop("bn1.running_mean"), r"lacks 1 entries.*bn1\.running_mean"),
        (drop("layer4.0.conv2.blur_filter"), r"blurs before .*allowed: nowhere, or before .*layer4\.0\.conv2"),
        (drop("fc.nesting_classifier_3.bias"), r"below fc\.; allowed"),
        (change("layer1.0.conv4.weight", torch.zeros(1)), r"unknown 1 entries.*layer1\.0\.conv4"),
        (change("conv1.weight", torch.zeros(64, 3, 3, 3)), r"other shapes for 1 entries.*conv1\.weight"),
        (change("layer2.0.conv2.blur_filter", torch.full((128, 1, 3, 3), 1 / 9)), r"is not \[1,2,1\]x\[1,2,1\]/16"),
        (change("layer1.0.conv2.blur_filter", torch.ones(64, 1, 3, 3)), r"blurs before .*layer1\.0\.conv2"),
        (change("fc.nesting_classifier_0.weight", torch.zeros(10, 8)), r"shapes \(10, 8\) and \(1000,\)"),
        (change("fc.nesting_classifier_1.weight", torch.zeros(1000, 8)), r"\[8, 8, 32.*strictly ascending"),
        (change("fc.extra.weight", torch.zeros(1)), r"below fc\.; allowed"),
        (lambda state: {**state, "conv1.weight": torch.zeros(1)}, r"\d+ of \d+ names begin with module\."),
        (lambda state: {key[7:].replace("layer", "stage"): value for key, value in state.items()}, "blurs before"),
        (lambda state: {"model": state, "epoch": 3}, "dict that is not a state dict"),
        (lambda state: {}, "not a state dict"),
        (lambda state: [1, 2], "list that is not a state dict"),
        (lambda state: nn.Linear(2, 2), "torch.load refuses it"),
    ],
)
def test_anything_else_is_refused_with_a_sentence(resnet, tmp_path, spoil, reason):
    path = tmp_path / "r50_mrl1_e0_ff2048.pt"
    torch.save(spoil(hollow(published(resnet, "mrl"))), path)
    with pytest.raises(UserError, match=reason) as caught:
        mrl.load(path, format="raivn")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_files_that_are_none_and_formats_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        mrl.load(tmp_path / "none.pt", format="raivn")
    (tmp_path / "noise.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="torch.load refuses it"):
        mrl.load(tmp_path / "noise.pt", format="raivn")
    with pytest.raises(UserError, match="format is 'pickle'; allowed: mrl, raivn"):
        mrl.load(tmp_path, format="pickle")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """One gray image of 8 px in each split of each of ImageNet's classes."""
    root = tmp_path_factory.mktemp("imagenet")
    images = np.random.default_rng(0).integers(256, size=(2, 1000, 8, 8), dtype=np.uint8)
    for split, of_split in zip(("train", "val"), images, strict=True):
        for name, pixels in zip(raivn.class_names(), of_split, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            (folder / "0.pgm").write_bytes(b"P5 8 8 255\n" + pixels.tobytes())
    return root


# As small as evaluation goes, and one view only: the point is the way, not the numbers.
SMALL = ["--data.backend", "memory", "--data.eval_resize_px", "8", "--data.eval_px", "8", "--data.flip", "false"]


def test_eval_takes_a_checkpoint_by_way_of_an_ordinary_run_directory(resnet, imagenet, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "figures_of", lambda rows: {})
    path = tmp_path / "r50_mrl0_e0_ff64.pt"
    torch.save(published(resnet, "ff64"), path)
    words = ["--data.root", str(imagenet), "--run.dir", str(tmp_path / "runs"), *SMALL]
    assert script.main(["--checkpoint", str(path), *words]) == 0
    run = tmp_path / "runs" / path.stem
    rows = read_rows(tmp_path / "runs" / "eval" / "results.jsonl")
    assert {(row.dataset, row.run, row.resize_px, row.crop_px) for row in rows} == {("imagenet", path.stem, 8, 8)}
    assert {"classification", "retrieval"} <= {row.study for row in rows}
    assert {(row.method, row.dim, row.n) for row in rows if row.metric == "top_1"} >= {("FF", 64, 1000)}

    assert read_config(run / "config.yaml").head.nesting_list == [64]
    assert "how it was trained" in (run / "config.yaml").read_text()
    [record] = json.loads((run / "provenance.json").read_text())
    assert record["imported_from"] == str(path)
    imported, taken = mrl.load(run), mrl.load(path, format="raivn")
    assert all(torch.equal(value, taken.state_dict()[key]) for key, value in imported.state_dict().items())
    assert imported.info.crop_px == 8

    # The same command again embeds nothing anew, from images that have moved too.
    monkeypatch.setattr(mrl.MatryoshkaClassifier, "embed", lambda *_: pytest.fail("embedded again"))
    assert script.main(["--checkpoint", str(path), *words, "--data.root", str(tmp_path / "elsewhere")]) == 0
    assert read_config(run / "config.yaml").data.root == str(tmp_path / "elsewhere")


def refused(capsys, run, *words):
    assert run(list(words)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_an_import_writes_over_nothing_but_itself(resnet, tmp_path, capsys):
    words = ["--data.root", "somewhere", "--run.dir", str(tmp_path / "runs"), "--run.name", "a"]
    state = hollow(published(resnet, "ff2048"))
    torch.save(state, tmp_path / "first.pt")
    first = [str(tmp_path / "first.pt"), *words]
    assert raivn.main([*first, "--head.nesting_list", "[2048]"]) == 0
    assert "eval.py --runs" in capsys.readouterr().out
    before = (tmp_path / "runs" / "a" / "model.safetensors").read_bytes()
    (tmp_path / "runs" / "a" / "model.json").unlink()  # as if it had been killed before the end
    assert raivn.main([*first, "--head.tied", "true"]) == 0
    assert (tmp_path / "runs" / "a" / "model.safetensors").read_bytes() == before
    assert mrl.load(tmp_path / "runs" / "a").head.tied
    torch.save(state | {"module.bn1.bias": torch.ones(64)}, tmp_path / "second.pt")
    line = refused(capsys, raivn.main, str(tmp_path / "second.pt"), *words, "--head.tied", "true")
    assert "holds something else" in line and "--run.name" in line


@pytest.mark.parametrize("run", [raivn.main, lambda words: script.main(["--checkpoint", *words])])
def test_mistakes_on_the_command_line_are_one_sentence(tmp_path, capsys, run):
    path = str(tmp_path / "none.pt")
    assert "data.root is not given" in refused(capsys, run, path)
    assert "no such file" in refused(capsys, run, path, "--data.root", "x")
    assert "--optim.lr cannot be set" in refused(capsys, run, path, "--data.root", "x", "--optim.lr", "1")
    assert "did you mean data.root" in refused(capsys, run, path, "--data.rot", "x")
    assert not (tmp_path / "runs").exists()


def test_settings_without_a_checkpoint_are_unknown_to_eval(capsys):
    with pytest.raises(SystemExit):
        script.main(["--runs", "runs/a", "--data.root", "x"])
    assert "unrecognized arguments: --data.root x" in capsys.readouterr().err
