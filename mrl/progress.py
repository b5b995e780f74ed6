"""Progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 20


def progress(iterable: Iterable[Any] | None = None, *, show: bool = True, **rest: Any) -> tqdm:
    """Return a tqdm bar with throughput and ETA that appears after two seconds; ``rest`` is tqdm's (desc, total, ...).

    If stderr is not a terminal but a log file, a line is added to it every 20 seconds.
    """
    settings: dict[str, Any] = {"delay": 2, "unit_scale": True, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        settings = {"delay": 2, "unit_scale": True, "file": _Lines(sys.stderr)}
        settings |= {"mininterval": SECONDS_BETWEEN_LINES, "maxinterval": SECONDS_BETWEEN_LINES}
    return tqdm(iterable, disable=not show, **(settings | rest))


class _Lines:
    """Writes each state of a bar as a line of its own."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()  # without carriage returns and "cursor up"
        if line:
            self.file.write(f"{line}\n")

    def flush(self) -> None:
        self.file.flush()
