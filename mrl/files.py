"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mrl.errors import UserError


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write ``path`` by way of a temporary name beside it, flushed to the disk before it is renamed.

    Raises:
        UserError: It cannot be written, e.g. because the disk is full; what stood there is kept.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the system's error in a RuntimeError
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path} could not be written ({cause}); what stood there before is kept") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; see `write_whole`."""
    write_whole(path, lambda file: file.write(text.encode()))
