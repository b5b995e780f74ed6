"""The backbone as a weights file of timm's own model."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from mrl.errors import UserError
from mrl.model import ModelInfo, load
from mrl.rundir import atomic_write

INSTEAD = "use the run in Python (mrl.load) or export it as ONNX"


def export_backbone(run: str | Path, out: str | Path) -> str:
    """The line of Python that loads it, after writing the backbone's state dict to ``out``.

    ``timm.create_model`` takes the file as its ``checkpoint_path`` and returns raw embeddings
    ``(B, D)``: take a prefix, then normalize it. The head stays behind.

    Args:
        run: A finished run directory, or a folder that was exported for the Hub.
        out: A file that ends in .safetensors, from which timm knows its format.

    Raises:
        UserError: The network is not timm's (BlurPool, small stem), or ``out`` has another ending.
    """
    out = Path(out)
    if out.suffix != ".safetensors" or not out.resolve().parent.is_dir():
        raise UserError(f"{out}: allowed is a file that ends in .safetensors, in a folder that exists")
    model = load(run)
    assert model.info is not None  # load fills it
    _check_is_timm(run, model.info)
    content = save({key: value.contiguous() for key, value in model.backbone.state_dict().items()})
    atomic_write(out, lambda file: file.write(content))
    settings = "".join(f", {key}={value!r}" for key, value in model.info.kwargs.items())
    return f"timm.create_model({model.info.backbone!r}, num_classes=0, checkpoint_path={str(out)!r}{settings})"


def _check_is_timm(run: str | Path, info: ModelInfo) -> None:
    if info.blurpool:
        # The keys would be those of the plain network: the file would load, and its embeddings be others.
        raise UserError(
            f"{run} has BlurPool, which timm's {info.backbone} has not: "
            f"the same weights would embed otherwise; {INSTEAD}"
        )
    if info.stem_stride != 4:
        raise UserError(
            f"{run} has a stem of stride {info.stem_stride}, timm's {info.backbone} one of 4: "
            f"the same weights would embed otherwise; {INSTEAD}"
        )
