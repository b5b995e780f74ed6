"""How far a run has come, read from its directory alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.grids import Grid, PlannedRun
from mrl.config import Config, to_yaml
from mrl.rundir import check_settings
from mrl.training.optim import px_at

LOG, ATTEMPTS = "train.log", "attempts.jsonl"
REFERENCE_PX = 64


@dataclass(frozen=True)
class RunState:
    """What a run directory tells.

    Attributes:
        word: "not started", "started" or "finished".
        epochs_done: Passes over the data, with fractions.
        top_1: ``{dim: accuracy}`` of the last validation.
        images_per_second: Median of what training logged; None where it has logged nothing.
        seconds: Wall time of all attempts that this script has seen end.
    """

    word: str
    epochs_done: float
    top_1: dict[int, float]
    images_per_second: float | None
    seconds: float


def read_state(run: PlannedRun) -> RunState:
    """The state of ``run``.

    Finished is what has a saved model and the validation of its last epoch.

    Raises:
        UserError: The directory holds a run with other settings.
    """
    directory = run.directory
    if (directory / "config.yaml").is_file():
        check_settings(directory, to_yaml(run.config), to_yaml(Config()), "remove it, or give another --runs")
    rows = read_rows_of(run)
    validations = [row for row in rows if any(key.startswith("val_loss/") for key in row)]
    epochs_done = max((row["epoch"] for row in rows), default=0.0)
    saved = (directory / "model.safetensors").is_file()
    finished = saved and any(row["epoch"] >= run.config.train.epochs for row in validations)
    started = epochs_done > 0 or (directory / "config.yaml").is_file()
    last = validations[-1] if validations else {}
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return RunState(
        "finished" if finished else "started" if started else "not started",
        epochs_done,
        {int(key.partition("/")[2]): value for key, value in last.items() if key.startswith("top_1/")},
        statistics.median(speeds) if speeds else None,
        sum(row["seconds"] for row in _json_lines(directory / ATTEMPTS)),
    )


def read_rows_of(run: PlannedRun) -> list[dict[str, Any]]:
    """What training has logged."""
    return _json_lines(run.directory / "metrics.jsonl")


def work(grid: Grid, config: Config, from_epoch: float = 0.0) -> float:
    """Training from ``from_epoch`` to the end, in images of 64 px: the area of an image counts."""
    whole = range(config.train.epochs)
    areas = [(px_at(epoch, config.data.train_px) / REFERENCE_PX) ** 2 for epoch in whole]
    shares = [min(1.0, max(0.0, epoch + 1 - from_epoch)) for epoch in whole]
    return grid.train_images * sum(area * share for area, share in zip(areas, shares, strict=True))


def estimated_seconds(grid: Grid, states: dict[str, RunState]) -> dict[str, float | None]:
    """Seconds of training that each run still needs, None where nothing is known of its backbone's speed.

    From the wall time of finished runs of the same backbone, else what training has logged, else what the grid assumes.
    """
    measured: dict[str, list[float]] = {}
    logged: dict[str, list[float]] = {}
    for run in grid.runs:
        state, backbone = states[run.name], run.config.model.backbone
        if state.word == "finished" and state.seconds > 0:
            measured.setdefault(backbone, []).append(work(grid, run.config) / state.seconds)
        if state.images_per_second is not None:
            # The median is of the size that most epochs have.
            area = statistics.median(px_at(e, run.config.data.train_px) ** 2 for e in range(run.config.train.epochs))
            logged.setdefault(backbone, []).append(state.images_per_second * area / REFERENCE_PX**2)
    found: dict[str, float | None] = {}
    for run in grid.runs:
        state, backbone = states[run.name], run.config.model.backbone
        speeds = measured.get(backbone) or logged.get(backbone)
        speed = statistics.mean(speeds) if speeds else grid.images_per_second_at_64_px
        left = 0.0 if state.word == "finished" else work(grid, run.config, state.epochs_done)
        found[run.name] = left / speed if speed else 0.0 if not left else None
    return found


def list_runs(grid: Grid, names: Sequence[str], states: dict[str, RunState]) -> str:
    """A table of the runs called ``names``: state, top-1 of the last validation, time still needed on one device."""
    estimates = estimated_seconds(grid, states)
    lines = []
    for run in (run for run in grid.runs if run.name in names):
        state, left = states[run.name], estimates[run.name]
        share = f" {100 * state.epochs_done / run.config.train.epochs:.0f}%" if state.word == "started" else ""
        left_shown = "" if state.word == "finished" else "unknown" if left is None else f"about {duration(left)}"
        took = duration(state.seconds) if state.seconds else ""
        lines.append([run.name, run.group, state.word + share, took, left_shown, accuracies(state)])
    cells = [["run", "group", "state", "trained for", "time left", "top-1"], *lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)
    known = [seconds for name in names if (seconds := estimates[name]) is not None]
    total = f"about {duration(sum(known))} of training left, one run after the other"
    if len(known) < len(names):
        total += f", beside {len(names) - len(known)} runs of unknown length"
    return f"{table}\n{len(lines)} runs; {total}"


def accuracies(state: RunState) -> str:
    """The last validation at the smallest and the largest size: "31.2% @8, 50.1% @2048"."""
    ends = sorted({min(state.top_1), max(state.top_1)}) if state.top_1 else []
    return ", ".join(f"{state.top_1[dim]:.1%} @{dim}" for dim in ends)


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds below two minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that a killed process may have left with half a last line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
