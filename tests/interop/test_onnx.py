import json
import sys

import numpy as np
import pytest
import torch

import mrl
from mrl import export
from mrl.errors import UserError
from mrl.interop.onnx import export_onnx

runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript")

# A ViT of one block, 64 wide.
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("backbone", "settings", "dim"),
    [
        ("test_resnet", {"blurpool": True, "stem_stride": 2}, 16),
        ("vit_tiny_patch16_224", {"kwargs": VIT}, None),
    ],
)
def test_onnxruntime_gives_what_encode_gives_for_any_batch(backbone, settings, dim, make_saved_run, tmp_path):
    run = make_saved_run("of_onnx", backbone, **settings)
    model = mrl.load(run)
    path = tmp_path / "model.onnx"
    assert export_onnx(run, path, dim) == (dim or model.width, 32)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32)
        [vectors] = session.run(["embedding"], {"images": images.numpy()})
        assert vectors.shape == (batch, dim or model.width)
        assert np.allclose(vectors, model.encode(images, dim).numpy(), atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == list(model.info.mean) and about["resize_px"] == "36"
    assert json.loads(about["trained_dims"]) == [8, 16, 32, model.width]


def test_what_cannot_be_exported_is_said(saved_run, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="cannot take 97 dims.*allowed are 1 to 96"):
        export_onnx(saved_run, tmp_path / "model.onnx", 97)
    assert export.main(["onnx", "--run", str(saved_run), "--out", str(tmp_path / "model.bin")]) == 2
    assert "ends in .onnx" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.main(["onnx", "--run", str(saved_run), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "needs onnxscript: pip install onnx onnxscript" in capsys.readouterr().err
