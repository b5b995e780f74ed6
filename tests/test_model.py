import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import mrl
from mrl.data.folder import decode
from mrl.errors import UserError
from mrl.model import BlurConv2d, ModelInfo, add_blurpool, build_backbone, build_model, freeze, save_model


def info_of(model, backbone, **changes):
    values = {
        "backbone": backbone,
        "kwargs": {},
        "stem_stride": 4,
        "blurpool": False,
        "nesting_list": model.head.nesting_list,
        "tied": model.head.tied,
        "scaled": model.head.scaled,
        "classes": ("cat", "dog", "eel"),
        "resize_px": 36,
        "crop_px": 32,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    return ModelInfo(**(values | changes))


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet10t", 512), ("vit_tiny_patch16_224", 192), ("convnext_atto", 320), ("efficientnet_b0", 1280)],
)
def test_the_embedding_of_any_family_is_what_timm_pools_at_its_own_width(name, width):
    kwargs = {"img_size": 32, "patch_size": 8} if name.startswith("vit") else {}
    model = build_model(build_backbone(name, kwargs=kwargs), num_classes=3)
    assert model.width == width == model.head.nesting_list[-1]
    images = torch.randn(2, 3, 32, 32)
    mrl.nested_cross_entropy(model(images), torch.tensor([0, 2])).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert torch.allclose(model.eval().embed(images), model.backbone(images), atol=1e-5)


def test_encode_is_the_unit_prefix_in_eval_mode_whatever_mode_the_model_is_in():
    model = build_model(build_backbone("resnet10t"), 3)
    images = torch.randn(4, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        raw = model.embed(images)[:, :64]
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    vectors = model.encode(images, dim=64)
    assert torch.allclose(vectors, raw / raw.norm(dim=1, keepdim=True), atol=1e-6)
    assert not vectors.requires_grad
    assert model.training and model.backbone.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_encode_defaults_to_the_largest_trained_dim_and_warns_of_untrained_ones():
    images = torch.zeros(1, 3, 32, 32)
    fixed = build_model(build_backbone("resnet10t"), 3, [64])
    assert fixed.encode(images).shape == (1, 64)
    with pytest.warns(UserWarning, match=r"12 dims were not trained; trained are \[64\]"):
        assert fixed.encode(images, dim=12).shape == (1, 12)
    with pytest.raises(UserError, match="1 to 512"):
        fixed.encode(images, dim=513)


def test_weights_that_cannot_be_downloaded_are_named_with_what_to_give_instead(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no\nconnection")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UserError, match=r"no connection Offline: .*/timm/tf_efficientnet_lite0.in1k$"):
        build_backbone("tf_efficientnet_lite0", init="pretrained")


def ffcv_style_blur(conv, images):
    """What FFCV's BlurPool computes, spelled out: pad by zeros, blur each channel, then convolve with stride."""
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    height, width = images.shape[2:]
    blurred = sum(kernel[i, j] * padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3))
    return nn.functional.conv2d(blurred, conv.weight, conv.bias, conv.stride, conv.padding)


def test_fault_18_blurpool_blurs_before_the_six_strided_convolutions_of_a_resnet50():
    backbone = timm.create_model("resnet50", num_classes=0)
    plain = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)}
    strided = {n for n, m in plain.items() if m.stride[0] > 1}
    add_blurpool(backbone)
    blurred = {name: m for name, m in backbone.named_modules() if isinstance(m, BlurConv2d)}
    assert set(blurred) == strided - {"conv1"}
    assert set(blurred) == {f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv2", "downsample.0")}
    for name, module in blurred.items():
        images = torch.randn(2, module.in_channels, 7, 8)
        with torch.no_grad():
            assert torch.allclose(module(images), ffcv_style_blur(plain[name], images), atol=1e-5)


def test_fault_18_timms_resnetblur50_is_another_function_under_the_same_parameter_names():
    ours = build_backbone("resnet50", blurpool=True).eval()
    theirs = timm.create_model("resnetblur50", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(ours(images), theirs(images), rtol=0.1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit_tiny_patch16_224", {"blurpool": True}, "no strided convolution"),
        ("tf_efficientnet_b0", {"blurpool": True}, "strided convolutions are .*Conv2dSame"),
        ("nfnet_l0", {"blurpool": True}, "strided convolutions are .*ScaledStdConv2d"),
        ("resnet50", {"blurpool": True, "init": "pretrained"}, r"give model\.blurpool false"),
        ("convnext_atto", {"stem_stride": 1}, "timm ResNets"),
        ("resnet5O", {}, r"'resnet5O' is not a timm model; similar names: .*resnet50"),
        ("resnet10t", {"kwargs": {"color": "red"}}, "does not fit resnet10t.*color"),
        ("resnet10t", {"init": "nowhere"}, "neither scratch"),
        ("resnet10t.bogus", {}, r"'resnet10t\.bogus': timm has no such weights; tags: c3_in1k"),
    ],
)
def test_backbones_that_cannot_be_built_are_refused_with_a_sentence(name, changes, message):
    with pytest.raises(UserError, match=message):
        build_backbone(name, **changes)


@pytest.mark.parametrize("name", ["resnet18", "resnet10t"])
def test_the_small_stem_keeps_more_of_the_image(name):
    sides = {
        stride: build_backbone(name, stem_stride=stride).forward_features(torch.zeros(1, 3, 64, 64)).shape[-1]
        for stride in (4, 2, 1)
    }
    assert sides == {4: 2, 2: 4, 1: 8}


def test_freezing_by_stage_keeps_the_frozen_batchnorms_in_eval_mode():
    model = build_model(build_backbone("resnet10t"), 3)
    freeze(model, ["layer4"])
    model.train()
    norms = {n: m for n, m in model.backbone.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert {name for name, m in norms.items() if m.training} == {n for n in norms if n.startswith("layer4")}
    with pytest.raises(UserError, match=r"no module 'layer9'.*layer4"):
        freeze(model, ["layer9"])


def test_a_projection_rotates_the_pooled_output_is_trained_and_is_saved(tmp_path):
    backbone = build_backbone("resnet10t")
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    model = build_model(build_backbone("resnet10t", str(tmp_path / "weights.safetensors"), projection=True), 3).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        pooled, z = backbone.eval()(images), model.embed(images)
        assert pooled.min() == 0 > z.min()
        torch.testing.assert_close(z @ z.T, pooled @ pooled.T, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(z, pooled @ model.backbone.fc.weight.T)
    freeze(model, "head")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if name.startswith("backbone")] == ["backbone.fc.weight", "backbone.fc.bias"]
    save_model(model, info_of(model, "resnet10t", projection=True), tmp_path)
    loaded = mrl.load(tmp_path)
    assert torch.equal(loaded.encode(images, 8), model.encode(images, 8))
    again = build_backbone("resnet10t", str(tmp_path), projection=True)
    assert torch.equal(again.fc.weight, model.backbone.fc.weight)
    with pytest.raises(UserError, match=r"model\.projection True, not False"):
        build_backbone("resnet10t", str(tmp_path))


def test_a_projection_keeps_the_pooling_that_was_asked_for():
    model = build_model(build_backbone("efficientnet_b0", kwargs={"global_pool": "max"}, projection=True), 3).eval()
    with torch.no_grad():
        features = model.backbone.forward_features(images := torch.randn(2, 3, 64, 64))
        expected = model.backbone.classifier(features.amax(dim=(2, 3)))
        torch.testing.assert_close(model.embed(images), expected)


@pytest.mark.parametrize(("tied", "scaled"), [(False, False), (True, False), (True, True)])
def test_a_saved_model_loads_and_encodes_alike(tmp_path, tied, scaled):
    backbone = build_backbone("resnet10t", stem_stride=1, blurpool=True)
    model = build_model(backbone, 3, [8, 64, 512], tied, scaled).eval()
    for scales in [model.head.log_scales.data] if scaled else []:
        scales.normal_()
    save_model(model, info_of(model, "resnet10t", stem_stride=1, blurpool=True), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    loaded = mrl.load(tmp_path)
    assert not loaded.training
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert torch.equal(loaded.encode(images, dim=8), model.encode(images, dim=8))
    assert loaded.preprocess(torch.full((3, 50, 40), 128, dtype=torch.uint8)).shape == (3, 32, 32)


def test_what_cannot_be_loaded_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no model\.json"):
        mrl.load(tmp_path)
    model = build_model(build_backbone("resnet10t"), 3)
    save_model(model, info_of(model, "resnet10t"), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        mrl.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    described = json.loads((tmp_path / "model.json").read_text())
    for changes, reason in [
        ({"format_version": 99}, "format 99"),
        ({"backbone": "resnet14t"}, "does not fit"),
        ({"surprise": 1}, "surprise"),
    ]:
        (tmp_path / "model.json").write_text(json.dumps(described | changes))
        with pytest.raises(UserError, match=reason):
            mrl.load(tmp_path)
    before = {key: value for key, value in described.items() if key != "exif_rotation"}
    (tmp_path / "model.json").write_text(json.dumps(before))
    assert mrl.load(tmp_path).info.exif_rotation == "ignore", "models of before that rule took pixels as stored"


def test_fault_10_weights_files_load_by_their_true_names_or_not_at_all(tmp_path):
    source = timm.create_model("resnet10t", num_classes=7)
    save_file(source.state_dict(), tmp_path / "timm.safetensors")
    backbone = build_backbone("resnet10t", init=str(tmp_path / "timm.safetensors"), blurpool=True)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key

    state = source.state_dict()
    torch.save({key: value for key, value in state.items() if "layer3" not in key}, tmp_path / "short.pt")
    with pytest.raises(UserError, match="lacks .* entries, e.g. .*layer3"):
        build_backbone("resnet10t", init=str(tmp_path / "short.pt"))
    torch.save({**state, "stranger": torch.zeros(1)}, tmp_path / "long.pt")
    with pytest.raises(UserError, match="unknown 1 entries.*stranger"):
        build_backbone("resnet10t", init=str(tmp_path / "long.pt"))
    (tmp_path / "noise.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read"):
        build_backbone("resnet10t", init=str(tmp_path / "noise.pt"))


def test_a_backbone_can_start_from_another_run(tmp_path):
    model = build_model(build_backbone("resnet10t", stem_stride=1), 3, [512])
    save_model(model, info_of(model, "resnet10t", stem_stride=1), tmp_path)
    backbone = build_backbone("resnet10t", init=str(tmp_path), stem_stride=1)
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in model.backbone.state_dict().items())
    with pytest.raises(UserError, match=r"model\.backbone resnet10t, not resnet14t"):
        build_backbone("resnet14t", init=str(tmp_path), stem_stride=1)
    with pytest.raises(UserError, match=r"model\.kwargs {}, not {'act_layer': 'elu'}"):
        build_backbone("resnet10t", init=str(tmp_path), stem_stride=1, kwargs={"act_layer": "elu"})
    kwargs = {"drop_path_rate": 0.1}
    again = build_backbone("resnet10t.c3_in1k", init=str(tmp_path), stem_stride=1, kwargs=kwargs).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.backbone.state_dict().items())
    kwargs = {"img_size": 64}
    vit = build_model(build_backbone("test_vit", kwargs=kwargs), 3, [64])
    (tmp_path / "vit").mkdir()
    save_model(vit, info_of(vit, "test_vit", kwargs=kwargs), tmp_path / "vit")
    with pytest.raises(UserError, match=r"another backbone: it has other shapes for 1 entries, e\.g\. \['pos_embed'\]"):
        build_backbone("test_vit", init=str(tmp_path / "vit"), kwargs={"img_size": 32})
    with pytest.raises(UserError, match=r"model\.blurpool False, not True"):
        build_backbone("resnet10t", init=str(tmp_path), stem_stride=1, blurpool=True)
    with pytest.raises(UserError, match=r"model\.stem_stride 1, not 2"):
        build_backbone("resnet10t", init=str(tmp_path), stem_stride=2)


def test_a_backbone_that_uses_a_module_in_two_places_is_saved(tmp_path):
    model = build_model(build_backbone("coat_lite_tiny"), 3, (8, 320)).eval()
    save_model(model, info_of(model, "coat_lite_tiny"), tmp_path)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(mrl.load(tmp_path).embed(images), model.embed(images))


def test_preprocess_reads_pil_images_as_files_are_read(tmp_path):
    """Upright if the model says so, over white, 16 bits scaled."""
    exif = Image.Exif()
    exif[0x112] = 8
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    pixels[:, :, 3] = np.where(np.arange(60) < 30, 255, 100)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "y.png", exif=exif)
    model = build_model(build_backbone("resnet10t"), 3)
    found = {}
    for rule in ("apply", "ignore"):
        model.info = info_of(model, "resnet10t", exif_rotation=rule)
        for name in ("x.png", "y.png"):
            found[rule, name] = model.preprocess(Image.open(tmp_path / name))
            expected = model.preprocess(decode(str(tmp_path / name), rule))
            torch.testing.assert_close(found[rule, name], expected, atol=2 / 255 / 0.25, rtol=0)
    assert not torch.allclose(found["apply", "x.png"], found["ignore", "x.png"], atol=0.1)
