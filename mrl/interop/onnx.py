"""A model as an ONNX file: normalized images in, unit embeddings out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from mrl.errors import UserError
from mrl.matryoshka import unit_prefix
from mrl.model import MatryoshkaClassifier, load
from mrl.rundir import atomic_write


class _Encoder(nn.Module):
    """`MatryoshkaClassifier.encode` at one dim, as a graph."""

    def __init__(self, model: MatryoshkaClassifier, dim: int):
        super().__init__()
        self.model = model
        self.dim = dim

    def forward(self, images: Tensor) -> Tensor:
        return unit_prefix(self.model.embed(images), self.dim)


def export_onnx(run: str | Path, out: str | Path, dim: int | None = None) -> tuple[int, int]:
    """Write a run or exported folder to ``out`` (.onnx), and return its ``(dim, crop_px)``.

    ``images`` ``(B, 3, crop_px, crop_px)`` float32, normalized as `preprocess` does, for any B, become ``embedding``
    ``(B, dim)`` of length 1. ``dim`` is the largest trained dim by default. The file's metadata holds image size,
    normalization and trained dims.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"the ONNX export needs {error.name}: pip install onnx onnxscript") from error
    model = load(run)
    info, dim = model.info, model.check_dim(dim)
    program = torch.onnx.export(
        _Encoder(model, dim).eval(),
        (torch.zeros(2, 3, info.crop_px, info.crop_px),),
        input_names=["images"],
        output_names=["embedding"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # it is None only with dynamo=False
    about = {"dim": dim, "trained_dims": info.nesting_list, "resize_px": info.resize_px, "crop_px": info.crop_px}
    about |= {"mean": info.mean, "std": info.std, "interpolation": info.interpolation}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    program.model.metadata_props["backbone"] = info.backbone
    atomic_write(Path(out), lambda file: program.save(file.name))
    return dim, info.crop_px
