"""Models from elsewhere, and exports of ours to other libraries."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from mrl import model
from mrl.errors import UserError
from mrl.interop.authors import load_checkpoint


def load(source: str | Path, format: str = "mrl", revision: str | None = None) -> model.MatryoshkaClassifier:
    """Return a saved model in eval mode on the CPU, with its ``info``.

    Args:
        source: For "mrl": a finished run directory, an exported folder, or a Hugging Face Hub id ``owner/name``.
            For "raivn": a weights file of the paper's authors, e.g. r50_mrl1_e0_ff2048.pt.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: The format is unknown, or the source does not exist or is not of that format.
    """
    if format not in ("mrl", "raivn"):
        raise UserError(f"format is {format!r}; allowed: mrl, raivn")
    if format == "raivn":
        return load_checkpoint(source)
    if not Path(source).is_dir():
        try:
            source = snapshot_download(str(source), revision=revision, allow_patterns=[*model.HUB_FILES])
        except Exception as error:  # the Hub's client raises errors of many kinds
            raise UserError(f"{source} is not a folder, and could not be downloaded from the Hub: {error}") from error
    return model.load(source)
