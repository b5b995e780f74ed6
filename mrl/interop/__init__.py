"""Models from elsewhere, and ours for elsewhere."""

from __future__ import annotations

from pathlib import Path

from mrl.errors import UserError
from mrl.model import MatryoshkaClassifier

FORMATS = ("mrl", "raivn")


def load(source: str | Path, format: str = "mrl", revision: str | None = None) -> MatryoshkaClassifier:
    """The model in ``source``, in eval mode on the CPU, its ``info`` filled.

    Args:
        source: As the format says.
        format: "mrl": a finished run directory, an exported folder, or a Hub id ``owner/name``. "raivn": a weights
            file of the paper's authors, such as r50_mrl1_e0_ff2048.pt; see `mrl.interop.authors.load_checkpoint`.
        revision: Branch, tag or commit on the Hub; not for folders and files.

    Raises:
        UserError: The format is unknown, or the source is not of it; see `mrl.interop.hub.from_pretrained`.
    """
    # Both here, or `python -m mrl.interop.authors` would find itself imported already.
    if format == "mrl":
        from mrl.interop.hub import from_pretrained

        return from_pretrained(source, revision)
    if format == "raivn":
        from mrl.interop.authors import load_checkpoint

        if revision is not None:
            raise UserError(f"{source} is a file, which has no revisions; leave out revision {revision!r}")
        return load_checkpoint(source)
    raise UserError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
