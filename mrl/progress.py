"""Progress bars on stderr that do not fill a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(iterable: Iterable[Any] | None = None, *, show: bool = True, **rest: Any) -> tqdm:
    """A tqdm bar with throughput and ETA that appears after two seconds; ``rest`` is tqdm's (desc, total, unit, ...).

    Where stderr is not a terminal each update is a line of a log, so there is one every 20 seconds at most.
    """
    settings = {
        "mininterval": 0.2 if sys.stderr.isatty() else 20,
        "delay": 2,
        "unit_scale": True,
        "dynamic_ncols": True,
    }
    return tqdm(iterable, disable=not show, **(settings | rest))
