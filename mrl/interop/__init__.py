"""Models from elsewhere, and ours for elsewhere."""

from __future__ import annotations

from pathlib import Path

from mrl import models
from mrl.errors import UserError
from mrl.models import MatryoshkaClassifier

FORMATS = ("mrl", "raivn")


def load(source: str | Path, format: str = "mrl") -> MatryoshkaClassifier:
    """The model in ``source``, in eval mode on the CPU, its ``info`` filled.

    Args:
        source: As the format says.
        format: "mrl": a finished run directory. "raivn": a weights file of the paper's authors, such as
            r50_mrl1_e0_ff2048.pt; see `mrl.interop.raivn.load_checkpoint`.

    Raises:
        UserError: The format is unknown, or the source is not of it.
    """
    if format == "mrl":
        return models.load(source)
    if format == "raivn":
        # Here, or `python -m mrl.interop.raivn` would find itself imported already.
        from mrl.interop.raivn import load_checkpoint

        return load_checkpoint(source)
    raise UserError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
