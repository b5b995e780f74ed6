"""Checkpoints built here with the authors' names and shapes, against torchvision's network."""

import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import eval as script  # not `eval`, which is Python's own
import mrl
from mrl.config import read_config
from mrl.errors import UserError
from mrl.interop import authors
from mrl.interop.authors import load_checkpoint

DIMS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
STRIDED = [f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv2", "downsample.0")]
KERNEL = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16


class BlurPoolConv2d(nn.Module):
    """A convolution as the authors wrap it: the names of its state are those in their files."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.register_buffer("blur_filter", KERNEL.expand(conv.in_channels, 1, 3, 3).clone())

    def forward(self, x):
        return self.conv(F.conv2d(x, self.blur_filter, padding=1, groups=x.shape[1]))


@pytest.fixture(scope="module")
def networks():
    """torchvision's ResNet-50 by whether it blurs, without its classifier; BatchNorms that saw images."""
    made = {}
    for blurpool in (False, True):
        torch.manual_seed(1)
        network = torchvision.models.resnet50()
        network.fc = nn.Identity()
        for name in STRIDED if blurpool else []:
            network.set_submodule(name, BlurPoolConv2d(network.get_submodule(name)))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
        with torch.no_grad():
            network(torch.randn(4, 3, 64, 64))
        made[blurpool] = network.eval()
    return made


def published(networks, kind, blurpool=True, prefix="module."):
    """A state dict as the authors save it."""
    dims = {f"nesting_classifier_{i}.": dim for i, dim in enumerate(DIMS)}
    dims = {"mrl": dims, "mrl_e": {"nesting_classifier_0.": 2048}, "ff64": {"": 64}}.get(kind, {"": 2048})
    head = {f"fc.{stem}weight": torch.randn(1000, dim) / dim**0.5 for stem, dim in dims.items()}
    head |= {f"fc.{stem}bias": torch.randn(1000) for stem in dims}
    return {prefix + key: value for key, value in (networks[blurpool].state_dict() | head).items()}


def hollow(state):
    """The same names and shapes, of one stored number each: a small file. Blurs are as they are."""
    return {k: v if k.endswith("blur_filter") else v.new_zeros(()).expand(v.shape) for k, v in state.items()}


def classify(state, kind, z):
    """Their logits by dim: a classifier each, or the first columns of one with all of its bias."""
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
        ("mrl_e", "final_weights", False, ""),
        ("old_mrl_e", "r50_mrl1_e1_ff2048", True, "module."),
        ("ff2048", "r50_mrl0_e0_ff2048", True, ""),
        ("ff64", "r50_mrl0_e0_ff64", True, "module."),
    ],
)
def test_fault_10_logits_and_embeddings_are_those_of_torchvision_with_and_without_module_in_the_names(
    networks, tmp_path, kind, name, blurpool, prefix
):
    state = published(networks, kind, blurpool, prefix)
    torch.save(state, tmp_path / f"{name}.pt")
    model = mrl.load(tmp_path / f"{name}.pt", format="raivn")
    images = torch.randn(2, 3, 64, 80)
    plain = {key.removeprefix(prefix): value for key, value in state.items()}
    with torch.no_grad():
        expected_z = networks[blurpool](images)
        expected = classify(plain, kind, expected_z)
        z, logits = model.embed(images), model(images)
    assert not model.training
    assert list(model.head.nesting_list) == list(expected)
    assert model.head.tied == kind.endswith("mrl_e")
    assert expected_z.std() > 0.01
    torch.testing.assert_close(z, expected_z, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, torch.stack(list(expected.values())), rtol=1e-3, atol=1e-3)
    classes = model.info.classes
    assert len(set(classes)) == 1000 and list(classes) == sorted(classes)
    # Tench, goldfish, ..., toilet tissue: the order of torchvision, with which the authors trained.
    assert (classes[0], classes[1], classes[999]) == ("n01440764", "n01443537", "n15075141")
    assert (model.info.resize_px, model.info.crop_px, model.info.blurpool) == (256, 224, blurpool)


def test_a_file_that_may_be_ff_or_mrl_e_needs_a_word_and_wrong_words_are_refused(networks, tmp_path):
    path = tmp_path / "final_weights.pt"
    torch.save(hollow(published(networks, "ff2048")), path)
    with pytest.raises(UserError, match=r"FF-2048 or MRL-E"):
        mrl.load(path, format="raivn")
    for given, dims, tied in [
        ({"nesting_list": [2048]}, [2048], False),
        ({"tied": True}, DIMS, True),
        ({"tied": True, "nesting_list": DIMS[1:]}, DIMS[1:], True),
    ]:
        model = load_checkpoint(path, **given)
        assert (list(model.head.nesting_list), model.head.tied) == (dims, tied)
    torch.save(hollow(published(networks, "mrl")), path)
    for given in ({"tied": True}, {"nesting_list": [2048]}):
        with pytest.raises(UserError, match=r"it has nesting_list \[8, 16.*tied False; given were"):
            load_checkpoint(path, **given)


def change(name, value):
    """Return a function that changes an entry of a state dict, or drops it if ``value`` is None."""
    name = f"module.{name}"
    return lambda state: {key: each for key, each in (state | {name: value}).items() if each is not None}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (change("layer4.0.conv2.blur_filter", None), r"lacks 1 entries.*layer4\.0\.conv2\.blur_filter"),
        (change("fc.nesting_classifier_3.bias", None), r"lacks 1 entries.*head\.classifiers\.3\.bias"),
        (change("layer1.0.conv2.blur_filter", torch.ones(64, 1, 3, 3)), r"unknown 1 .*layer1\.0\.conv2\.blur_filter"),
        (change("layer2.0.conv2.blur_filter", torch.full((128, 1, 3, 3), 1 / 9)), r"is not \[1,2,1\]x\[1,2,1\]/16"),
        (change("fc.nesting_classifier_0.weight", torch.zeros(10, 8)), r"other shapes for 1 .*classifiers\.0\.weight"),
        (lambda state: {key: value for key, value in state.items() if ".fc." not in key}, "has no classifier"),
        (lambda state: {"model": state, "epoch": 3}, "dict that is not a state dict"),
        (lambda state: nn.Linear(2, 2), "torch.load refuses it"),
    ],
)
def test_anything_else_is_refused_with_one_sentence(networks, tmp_path, spoil, reason):
    path = tmp_path / "r50_mrl1_e0_ff2048.pt"
    torch.save(spoil(hollow(published(networks, "mrl"))), path)
    with pytest.raises(UserError, match=reason) as caught:
        mrl.load(path, format="raivn")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_eval_imports_a_checkpoint_into_an_ordinary_run_directory_and_keeps_its_embeddings(
    networks, tmp_path, monkeypatch
):
    evaluated = []
    monkeypatch.setattr(script, "evaluate", lambda args, process: evaluated.extend(args.runs))
    path, run = tmp_path / "r50_mrl0_e0_ff64.pt", tmp_path / "runs" / "r50_mrl0_e0_ff64"
    torch.save(published(networks, "ff64"), path)
    for root in ("DIR", "elsewhere"):
        argv = ["--checkpoint", str(path), "--data.root", root, "--run.dir", str(tmp_path / "runs")]
        assert script.main([*argv, "--data.eval_px", "160"]) == 0
        config = read_config(run / "config.yaml")
        assert config.data.root == root and config.head.nesting_list == [64] and config.model.blurpool
        if root == "DIR":
            (run / "embeddings").mkdir()
    assert evaluated == [str(run)] * 2 and (run / "embeddings").is_dir()
    [record] = json.loads((run / "provenance.json").read_text())
    assert record["imported_from"] == str(path)
    imported, direct = mrl.load(run), mrl.load(path, format="raivn")
    assert all(torch.equal(value, direct.state_dict()[key]) for key, value in imported.state_dict().items())
    assert imported.info.crop_px == 160


def test_an_import_replaces_nothing_but_itself_and_takes_settings_of_data_only(networks, tmp_path, capsys):
    argv = ["--data.root", "somewhere", "--run.dir", str(tmp_path / "runs"), "--run.name", "a", "--head.tied", "true"]
    state = hollow(published(networks, "ff2048"))
    torch.save(state, tmp_path / "first.pt")
    authors.import_checkpoint([str(tmp_path / "first.pt"), *argv])
    (tmp_path / "runs" / "a" / "model.json").unlink()  # as if it had been killed before the end
    authors.import_checkpoint([str(tmp_path / "first.pt"), *argv])
    assert mrl.load(tmp_path / "runs" / "a").head.tied
    torch.save(state | {"module.bn1.bias": torch.ones(64)}, tmp_path / "second.pt")
    for file, more, message in (
        ("second.pt", [], "does not hold an import of"),
        ("none.pt", [], "No such file"),
        ("first.pt", ["--optim.lr", "1"], "--optim.lr cannot be set"),
    ):
        assert script.main(["--checkpoint", str(tmp_path / file), *argv, *more]) == 2
        assert message in capsys.readouterr().err
