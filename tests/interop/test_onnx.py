import json
import sys

import numpy as np
import pytest
import torch

import mrl
from mrl import export
from mrl.errors import UserError
from mrl.interop.onnx import export_onnx

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# A ViT of one block, 64 wide.
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize("name", ["blurred", "vit", "ff"])
def test_onnxruntime_gives_what_encode_gives_for_any_batch(name, make_saved_run, ff_run, tmp_path):
    if name == "ff":
        run, dim, expected_dim = ff_run, None, 32
    elif name == "vit":
        run, dim, expected_dim = make_saved_run("vit", "vit_tiny_patch16_224", kwargs=VIT), None, 64
    else:
        run, dim, expected_dim = make_saved_run("blurred", blurpool=True, stem_stride=2), 16, 16
    model = mrl.load(run)
    path = tmp_path / "model.onnx"
    assert export_onnx(run, path, dim) == (expected_dim, 32)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32)
        [vectors] = session.run(["embedding"], {"images": images.numpy()})
        assert np.allclose(vectors, model.encode(images, expected_dim).numpy(), atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == list(model.info.mean) and metadata["resize_px"] == "36"
    assert json.loads(metadata["trained_dims"]) == list(model.info.nesting_list)


def test_what_cannot_be_exported_is_named(saved_run, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="97 dims"):
        export_onnx(saved_run, tmp_path / "model.onnx", 97)
    assert export.main(["onnx", "--run", str(saved_run), "--out", str(tmp_path / "model.bin")]) == 2
    assert "ends in .onnx" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.main(["onnx", "--run", str(saved_run), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "needs onnxscript: pip install onnx onnxscript" in capsys.readouterr().err
