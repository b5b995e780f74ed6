"""The engine for networks that are only evaluated."""

import pytest
import torch
from torch import nn

from mrl import engine
from mrl.engine import fast_forward
from mrl.model import build_backbone


def test_onnx_runtime_gives_the_same_values_for_any_batch_and_autocast_does_not_reach_it():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    backbone = build_backbone("test_resnet")
    images = torch.randn(5, 3, 64, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        forward, name = fast_forward(backbone, images[:2])
        found = forward(images)
    assert name == "ONNX Runtime" and not backbone.training
    with torch.no_grad():
        torch.testing.assert_close(found, backbone(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["wrong values", "raises"])
def test_an_engine_that_fails_or_gives_other_values_is_not_used(monkeypatch, how):
    def broken(module, images):
        if how == "raises":
            raise RuntimeError("no such operator")
        return lambda batch: module(batch) * torch.tensor([1.0, 1.1]).repeat(24)

    monkeypatch.setattr(engine, "_onnx_runtime", broken)
    module = nn.Flatten()
    forward, name = fast_forward(module, torch.randn(2, 3, 4, 4))
    assert forward is module
    assert name.startswith(
        "PyTorch (ONNX Runtime: " + {"raises": "RuntimeError: no such"}.get(how, "its values differ")
    )


def test_an_export_must_be_worth_its_time_and_the_first_batch_decides_for_all(monkeypatch):
    exports, reports = [], []

    def export(module, images):
        exports.append(len(images))
        return lambda batch: module(batch)

    monkeypatch.setattr(engine, "_onnx_runtime", export)
    module, batch = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), torch.randn(4, 3, 32, 32)
    for num_images, expected in ((4, "PyTorch"), (10**9, "ONNX Runtime")):
        forward = engine.FastForward(module, num_images, reports.append)
        assert reports == reports[:0] or reports[-1] == "PyTorch", "nothing is chosen before there is a batch"
        for _ in range(3):
            torch.testing.assert_close(forward(batch), module(batch))
        assert reports[-1] == expected
    assert reports == ["PyTorch", "ONNX Runtime"] and exports == [2]


def test_a_difference_is_seen_that_the_largest_value_hides(monkeypatch):
    """Errors of all small coordinates, each far below the largest one, turn a vector."""
    wide = torch.full((1, 2048), 0.02)
    wide[0, 0] = 1.0
    turned = wide + 0.0009
    monkeypatch.setattr(engine, "_onnx_runtime", lambda module, images: lambda batch: turned)
    forward, name = fast_forward(nn.Identity(), wide)
    assert "its values differ" in name and forward(wide) is wide
