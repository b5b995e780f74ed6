"""The backbone as a weights file for timm."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from mrl.errors import UserError
from mrl.model import load
from mrl.rundir import atomic_write


def export_backbone(run: str | Path, out: str | Path) -> str:
    """Write the backbone's weights to ``out`` (.safetensors), and return the line of Python that loads them.

    The loaded network returns raw embeddings ``(B, D)``.

    Raises:
        UserError: The network is not timm's own, because of BlurPool or a small stem.
    """
    model = load(run)
    info = model.info
    if info.blurpool or info.stem_stride != 4:
        # The names of the weights are the same, so timm would load them without an error.
        change = "BlurPool" if info.blurpool else f"a stem of stride {info.stem_stride}"
        raise UserError(
            f"{run} has {change}, which timm's {info.backbone} does not have, so timm would compute other embeddings; "
            "use mrl.load or the ONNX export"
        )
    content = save({key: value.contiguous().clone() for key, value in model.backbone.state_dict().items()})
    atomic_write(Path(out), lambda file: file.write(content))
    kwargs = "".join(f", {key}={value!r}" for key, value in info.kwargs.items())
    num_classes = model.width if info.projection else 0
    line = f"timm.create_model({info.backbone!r}, num_classes={num_classes}, checkpoint_path={str(out)!r}{kwargs})"
    return f"{line}  # then normalize the first {info.nesting_list[-1]} numbers, or fewer"
