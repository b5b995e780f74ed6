"""Results as rows: one number each, with everything needed to read it alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mrl.errors import UserError
from mrl.rundir import atomic_write_text

METHODS = ("MRL", "MRL weighted", "MRL-E", "FF", "FF truncated")
CLASS_STUDY, CLASSES_FILE = "per_class", "classes.csv"
DATA_TITLES = {
    **{"digits": "handwritten digits", "imagenet": "ImageNet-1K", "tiny_imagenet": "Tiny-ImageNet"},
    **{f"imagenet_{name}": f"ImageNet-{name.title()}" for name in ("v2", "a", "r", "sketch")},
}
_CLASS_COLUMNS = (
    *("study", "dataset", "run", "method", "dim", "group", "metric"),
    *("value", "n", "seed", "resize_px", "crop_px", "flip"),
)


def data_title(dataset: str) -> str:
    """Return the name of the data in titles: that of a known data set, else ``dataset`` without underscores."""
    return DATA_TITLES.get(dataset) or dataset.replace("tiny_imagenet", "Tiny-ImageNet").replace("_", " ")


def method_name(nesting_list: Sequence[int], tied: bool, weights: Sequence[float] | None = None) -> str:
    """Return the paper's name of a model: "FF" if it has one size, else "MRL-E" if tied, else "MRL".

    "MRL weighted" and "MRL-E weighted" were trained with loss ``weights``.
    """
    if len(nesting_list) == 1:
        return "FF"
    return ("MRL-E" if tied else "MRL") + " weighted" * (weights is not None)


def method_order(method: str) -> tuple[int, str]:
    """Return a sort key that puts the paper's methods first, in its order, and then others by name."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number.

    Attributes:
        study: Name of the experiment, e.g. "classification".
        dataset: Name of the evaluated data.
        run: Name of the trained model.
        method: One of `METHODS`, or a baseline's name.
        dim: Prefix size; None if several are in use (adaptive retrieval).
        shortlist_dim: Adaptive retrieval: prefix size of the first search.
        shortlist_size: Adaptive retrieval, quantization: number of neighbors that it passes on.
        rerank_dim: Adaptive retrieval, quantization: prefix size of the last reranking.
        code: Quantization: how a prefix is stored, e.g. "int8"; see `mrl.retrieval.quantization`.
        group: The class, superclass or trend that the row is about; None if it is about all images.
        metric: Name of the metric, e.g. "top_1".
        value: In [0, 1]; for a metric whose name begins with "cosine", in [-1, 1].
        cost: Million multiply-adds per query of a search; None outside retrieval, and for codes.
        expected_dim: Mean prefix size per image if it differs between images, else None.
        ms_per_query: Measured CPU milliseconds per query for the operations that `cost` counts, all queries in one
            batch; None if not measured. provenance.json names the CPU.
        bytes: Quantization: bytes per vector that a search reads; None elsewhere.
        n: Number of images that `value` is a mean over.
        seed: Seed of the training run.
        resize_px: Shorter side of an image after resizing.
        crop_px: Side of its center crop.
        flip: Whether the logits of the mirrored image were added.
    """

    study: str
    dataset: str
    run: str
    method: str
    dim: int | None = None
    shortlist_dim: int | None = None
    shortlist_size: int | None = None
    rerank_dim: int | None = None
    code: str | None = None
    group: str | None = None
    metric: str
    value: float
    cost: float | None = None
    expected_dim: float | None = None
    ms_per_query: float | None = None
    bytes: int | None = None
    n: int
    seed: int
    resize_px: int
    crop_px: int
    flip: bool

    def __post_init__(self) -> None:
        lowest = -1 if self.metric.startswith("cosine") else 0
        if not lowest <= self.value <= 1:
            raise UserError(
                f"{self.metric} of {self.run} ({self.study}) is {self.value}; allowed are values from {lowest} to 1"
            )


@dataclass(frozen=True)
class Source:
    """The fields that all rows of one run on one dataset share."""

    dataset: str
    run: str
    seed: int
    resize_px: int
    crop_px: int
    flip: bool

    @property
    def title(self) -> str:
        """Data and run, for figures."""
        return f"{data_title(self.dataset)}, {self.run}"

    def row(self, study: str, method: str, metric: str, value: float, n: int, **rest: Any) -> Row:
        """Return a `Row` of this source; ``rest`` are its optional fields."""
        return Row(study=study, method=method, metric=metric, value=value, n=n, **vars(self), **rest)


def write_rows(rows: Iterable[Row], path: str | Path) -> None:
    """Write rows to ``path``, one JSON object a line, and those of single classes to classes.csv beside it."""
    path, rows = Path(path), list(rows)
    of_classes = [vars(row) for row in rows if _is_of_class(row)]
    classes_file = path.with_name(CLASSES_FILE)
    if of_classes:
        atomic_write_text(classes_file, pd.DataFrame(of_classes)[list(_CLASS_COLUMNS)].to_csv(index=False))
    else:
        classes_file.unlink(missing_ok=True)
    lines = [json.dumps(vars(row)) + "\n" for row in rows if not _is_of_class(row)]
    atomic_write_text(path, "".join(lines))


def _is_of_class(row: Row) -> bool:
    return row.study == CLASS_STUDY and row.dim is not None


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows that `write_rows` wrote: those in ``path``, then those in classes.csv beside it, if it exists.

    Raises:
        UserError: ``path`` does not exist, or one of the files holds something other than rows.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist, so there are no results to read")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [_parse_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    classes_file = path.with_name(CLASSES_FILE)
    return rows + (_read_classes(classes_file) if classes_file.is_file() else [])


def _parse_row(line: str, place: str) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{place}: a row is a JSON object, but this is of type {type(values).__name__}")
    known = {field.name for field in dataclasses.fields(Row)}
    # Files that were written before a column existed have no such key.
    needed = {field.name for field in dataclasses.fields(Row) if field.default is dataclasses.MISSING}
    for problem, keys in (("unknown", values.keys() - known), ("missing", needed - values.keys())):
        if keys:
            raise UserError(f"{place}: {problem} keys {sorted(keys)}; a row has {sorted(known)}")
    if isinstance(values["value"], bool) or not isinstance(values["value"], int | float):
        raise UserError(f"{place}: value is {values['value']!r}; allowed is a number from 0 to 1")
    return Row(**values)


def _read_classes(path: Path) -> list[Row]:
    # A class may be called "1", "NA" or "true".
    types = {field.name: field.type.split()[0] for field in dataclasses.fields(Row)}
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False)
        if tuple(table.columns) != _CLASS_COLUMNS:
            raise ValueError(f"has {', '.join(map(str, table.columns))}")
    except ValueError as error:
        raise UserError(f"{path} must be a table with the columns {', '.join(_CLASS_COLUMNS)}, but {error}") from error
    return [Row(**values) for values in table.to_dict("records")]


def text_table(rows: Sequence[Row]) -> str:
    """Return tables in percent, one per dataset, study and metric: a line per method and run, a column per dim."""
    of_all_images = [vars(row) for row in rows if row.dim is not None and row.group is None]
    if not of_all_images:
        return ""
    tables = []
    for names, group in pd.DataFrame(of_all_images).groupby(["dataset", "study", "metric"], sort=False):
        percent = 100 * group.pivot_table("value", ["method", "run"], "dim", aggfunc="last")
        percent = percent.loc[sorted(percent.index, key=lambda name: (method_order(name[0]), name[1]))]
        counts = " to ".join(f"{n:,}" for n in sorted({group["n"].min(), group["n"].max()}))
        text = percent.rename_axis(columns=None).to_string(float_format="{:.2f}".format, na_rep="-", sparsify=False)
        tables.append("{}: {}, {} (%)".format(*names) + f", n = {counts}\n{text}")
    return "\n\n".join(tables)
