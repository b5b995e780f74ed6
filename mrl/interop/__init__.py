"""Models from elsewhere, and ours for elsewhere."""

from __future__ import annotations

from pathlib import Path

from mrl.models import MatryoshkaClassifier


def load(source: str | Path, revision: str | None = None) -> MatryoshkaClassifier:
    """The model in ``source``, in eval mode on the CPU, its ``info`` filled.

    Args:
        source: A finished run directory, an exported folder, or a Hub id ``owner/name``.
        revision: Branch, tag or commit on the Hub; not for folders.

    Raises:
        UserError: The source is none of these, or cannot be read; see `mrl.interop.hub.from_pretrained`.
    """
    from mrl.interop.hub import from_pretrained

    return from_pretrained(source, revision)
