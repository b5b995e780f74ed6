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


@pytest.mark.parametrize("how", ["turned", "raises"])
def test_an_engine_that_fails_or_gives_other_values_is_not_used(monkeypatch, how):
    # Errors of all small coordinates, each far below the largest one, turn a vector.
    wide = torch.full((1, 2048), 0.02)
    wide[0, 0] = 1.0

    def broken(module, images):
        if how == "raises":
            raise RuntimeError("no such operator")
        return lambda batch: batch + 0.0009

    monkeypatch.setattr(engine, "_onnx_runtime", broken)
    module = nn.Identity()
    forward, name = fast_forward(module, wide)
    assert forward is module
    assert ("RuntimeError: no such operator" if how == "raises" else "its values differ") in name


def test_an_export_must_be_worth_its_time_and_the_first_batch_decides_for_all(monkeypatch):
    exports, reports = [], []

    def export(module, images):
        exports.append(len(images))
        return module

    monkeypatch.setattr(engine, "_onnx_runtime", export)
    module, batch = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), torch.randn(4, 3, 32, 32)
    for num_images in (4, 10**9):
        forward = engine.FastForward(module, num_images, reports.append)
        for _ in range(3):
            torch.testing.assert_close(forward(batch), module(batch))
    assert reports == ["PyTorch", "ONNX Runtime"] and exports == [2]
