"""A model as an ONNX file: images in, unit embeddings out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from mrl.errors import UserError
from mrl.matryoshka import prefix, unit_prefix
from mrl.model import MatryoshkaClassifier, load

INPUT, OUTPUT = "images", "embedding"


class _Encoder(nn.Module):
    """`MatryoshkaClassifier.encode` at one size, as a graph can hold it."""

    def __init__(self, model: MatryoshkaClassifier, dim: int):
        super().__init__()
        self.model = model
        self.dim = dim

    def forward(self, images: Tensor) -> Tensor:
        return unit_prefix(self.model.embed(images), self.dim)


def export_onnx(run: str | Path, out: str | Path, dim: int | None = None) -> tuple[int, int]:
    """``(dim, crop_px)`` of the file, after writing it to ``out``.

    Its input ``images`` is ``(B, 3, crop_px, crop_px)`` float32, normalized as `preprocess` does, for any B;
    its output ``embedding`` is ``(B, dim)`` of length 1. Its metadata say how to normalize, and which
    sizes were trained. A vector of full width can be cut further, if it is scaled to length 1 again.

    Args:
        run: A finished run directory, or a folder that was exported for the Hub.
        out: A file that ends in .onnx.
        dim: Prefix size; the full width when None.

    Raises:
        UserError: The run is not finished, ``dim`` does not fit it, ``out`` has another ending, or what
            torch needs for the export is not installed.
    """
    out = Path(out)
    if out.suffix != ".onnx" or not out.resolve().parent.is_dir():
        raise UserError(f"{out}: allowed is a file that ends in .onnx, in a folder that exists")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"the ONNX export needs {error.name}: pip install onnx onnxscript") from error
    model = load(run)
    info = model.info
    assert info is not None  # load fills it
    dim = model.width if dim is None else dim
    prefix(torch.empty(model.width), dim)  # says which sizes there are
    images = torch.zeros(2, 3, info.crop_px, info.crop_px)
    program = torch.onnx.export(
        _Encoder(model, dim).eval(),
        (images,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # as it is with dynamo=True
    program.model.metadata_props.update(
        {
            "backbone": info.backbone,
            "dim": str(dim),
            "trained_dims": json.dumps(info.nesting_list),
            "resize_px": str(info.resize_px),
            "crop_px": str(info.crop_px),
            "mean": json.dumps(info.mean),
            "std": json.dumps(info.std),
        }
    )
    program.save(out)  # with the weights inside, unless they are larger than the 2 GB that such a file can hold
    return dim, info.crop_px
