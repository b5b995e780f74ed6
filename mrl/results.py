"""Results as rows: what was measured, on what, from which run; written, read and shown as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrl.errors import UserError
from mrl.rundir import atomic_write_text

METHODS = ("MRL", "MRL-E", "FF", "FF truncated")


def method_name(nesting_list: Sequence[int], tied: bool) -> str:
    """What the paper calls a model: "FF" when one size was trained, else "MRL-E" when tied, else "MRL"."""
    if len(nesting_list) == 1:
        return "FF"
    return "MRL-E" if tied else "MRL"


@dataclass(frozen=True)
class Row:
    """One number and all that is needed to read it without its neighbors.

    Attributes:
        study: Experiment, e.g. "classification".
        dataset: Name of the data that the images are of.
        run: Name of the trained model.
        method: One of `METHODS`, or a baseline's name.
        dim: Prefix size in use; None where several are (adaptive retrieval).
        shortlist_dim: Adaptive retrieval: prefix size of the first search.
        shortlist_size: Adaptive retrieval: how many neighbors it hands on.
        rerank_dim: Adaptive retrieval: prefix size that orders them.
        metric: What `value` is, e.g. "top_1".
        value: 0 to 1; a mean cosine, whose metric begins with "cosine", -1 to 1.
        cost: Million multiply-adds per query of a search; None outside retrieval.
        expected_dim: Mean number of dims used per image, where that differs from image to image; else None.
        ms_per_query: Measured milliseconds per query, all queries in one batch, of the searches and rerankings that
            `cost` counts, on the CPU that provenance.json names; None where not measured.
        n: Number of images that `value` is a mean over.
        seed: Seed of the training run.
        resize_px: Shorter side of an image after resizing.
        crop_px: Side of its center crop.
        flip: Whether the mirrored image took part.
    """

    study: str
    dataset: str
    run: str
    method: str
    dim: int | None
    shortlist_dim: int | None
    shortlist_size: int | None
    rerank_dim: int | None
    metric: str
    value: float
    cost: float | None
    expected_dim: float | None
    ms_per_query: float | None
    n: int
    seed: int
    resize_px: int
    crop_px: int
    flip: bool

    def __post_init__(self) -> None:
        lowest = -1 if self.metric.startswith("cosine") else 0
        if not lowest <= self.value <= 1:
            raise UserError(
                f"{self.metric} of {self.run} ({self.study}) is {self.value}; it must lie between {lowest} and 1"
            )


_OPTIONAL = ("dim", "shortlist_dim", "shortlist_size", "rerank_dim", "cost", "expected_dim", "ms_per_query")


@dataclass(frozen=True)
class Source:
    """What all rows of one run on one dataset share; `row` fills in the rest."""

    dataset: str
    run: str
    seed: int
    resize_px: int
    crop_px: int
    flip: bool

    def row(self, study: str, method: str, metric: str, value: float, n: int, **rest: Any) -> Row:
        """A `Row` of this source; ``dim``, the sizes of adaptive retrieval, costs and time are None unless given."""
        given: dict[str, Any] = dict.fromkeys(_OPTIONAL) | rest
        return Row(study=study, method=method, metric=metric, value=value, n=n, **dataclasses.asdict(self), **given)


def write_rows(rows: Iterable[Row], path: str | Path) -> None:
    """Write one JSON object a line, to a temporary name first, so that ``path`` is never half there."""
    atomic_write_text(Path(path), "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))


def read_rows(path: str | Path) -> list[Row]:
    """The rows that `write_rows` wrote.

    Raises:
        UserError: The file is not there, or a line is not JSON or has unknown or missing keys; the
            message names the line and the keys.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist, so there are no results to read")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_parse_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse_row(line: str, place: str) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{place}: not a row, which is a JSON object, but {type(values).__name__}")
    known = {field.name for field in dataclasses.fields(Row)}
    for problem, keys in (("unknown", values.keys() - known), ("missing", known - values.keys())):
        if keys:
            raise UserError(f"{place}: {problem} keys {sorted(keys)}; a row has {sorted(known)}")
    if isinstance(values["value"], bool) or not isinstance(values["value"], int | float):
        raise UserError(f"{place}: value is {values['value']!r}; allowed is a number from 0 to 1")
    return Row(**values)


def text_table(rows: Sequence[Row]) -> str:
    """Tables of values in percent, one per dataset, study and metric: a line per method and run, a column per dim."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.dim is not None:
            groups.setdefault((row.dataset, row.study, row.metric), []).append(row)
    return "\n\n".join(_one_table(f"{d}: {s}, {m} (%)", group) for (d, s, m), group in groups.items())


def _one_table(title: str, rows: Sequence[Row]) -> str:
    dims = sorted({row.dim for row in rows if row.dim is not None})
    values = {(row.method, row.run, row.dim): f"{100 * row.value:.2f}" for row in rows}
    names = sorted({(row.method, row.run) for row in rows}, key=lambda name: (method_order(name[0]), name[1]))
    cells = [["method", "run", *map(str, dims)]]
    cells += [[method, run, *(values.get((method, run, dim), "-") for dim in dims)] for method, run in names]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    counts = " to ".join(f"{n:,}" for n in sorted({min(row.n for row in rows), max(row.n for row in rows)}))
    return "\n".join([f"{title}, n = {counts}", *lines])


def method_order(method: str) -> tuple[int, str]:
    """Sort key that puts the paper's methods first, in its order, then others by name."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)
