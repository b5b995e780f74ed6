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
        return lambda batch: module(batch) + 1

    monkeypatch.setattr(engine, "_onnx_runtime", broken)
    module = nn.Flatten()
    forward, name = fast_forward(module, torch.randn(2, 3, 4, 4))
    assert forward is module
    assert name.startswith(
        "PyTorch (ONNX Runtime: " + {"raises": "RuntimeError: no such"}.get(how, "its values differ")
    )
