"""Progress bars on stderr: a moving line in a terminal, now and then a line in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 20


def progress(iterable: Iterable[Any] | None = None, *, show: bool = True, **rest: Any) -> tqdm:
    """A tqdm bar with throughput and ETA that appears after two seconds; ``rest`` is tqdm's (desc, total, unit, ...).

    Where stderr is not a terminal it writes a line every 20 seconds, and a last one if it has written any.
    """
    kind, settings = tqdm, {"delay": 2, "unit_scale": True, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        kind = _LogLines
        settings |= {"mininterval": _SECONDS_BETWEEN_LINES, "maxinterval": _SECONDS_BETWEEN_LINES}
    return kind(iterable, disable=not show, **(settings | rest))


class _LogLines(tqdm):
    """Writes whole lines and never goes back over one."""

    _shown_at: float | None = None
    _shown_n: float | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        # tqdm asks for more lines than are due: beside whatever else is printed, for one. It measures the time too.
        now = time.monotonic()
        too_soon = self._shown_at is not None and now - self._shown_at < 0.9 * _SECONDS_BETWEEN_LINES
        if msg == "" or too_soon or self.n == self._shown_n:
            return False
        self._shown_at, self._shown_n = now, self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        pass

    def close(self) -> None:
        if not self.disable and self._shown_at is not None:
            self._shown_at = -math.inf
            self.display()
        self.leave = False  # or tqdm adds an empty line
        super().close()
