"""Results as rows: one number each, with everything needed to read it alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mrl.config import HeadConfig
from mrl.errors import UserError
from mrl.rundir import atomic_write_text

METHODS = ("MRL", "MRL weighted", "MRL distilled", "MRL-E", "MRL-E scaled", "MRL-E distilled", "FF", "FF truncated")
CLASS_STUDY, CLASSES_FILE = "per_class", "classes.csv"
DATA_TITLES = {
    **{"digits": "Handwritten digits", "imagenet": "ImageNet-1K", "tiny_imagenet": "Tiny-ImageNet"},
    **{"caltech_47": "Caltech-101, 47 classes", "imagenette": "Imagenette", "imagewoof": "Imagewoof"},
    **{f"imagenet_{name}": f"ImageNet-{name.title()}" for name in ("v2", "a", "r", "sketch")},
}
_CLASS_COLUMNS = ["study", "dataset", "run", "method", "dim", "group", "metric", "value", "n", "seed"]
_CLASS_COLUMNS += ["resize_px", "crop_px", "flip"]


def data_title(dataset: str) -> str:
    """Return the name of the data in titles: that of a known data set, else ``dataset`` as words."""
    return DATA_TITLES.get(dataset) or dataset.replace("tiny_imagenet", "Tiny-ImageNet").replace("_", " ")


def method_name(nesting_list: Sequence[int], head: HeadConfig) -> str:
    """Return the paper's name of a model: "FF" if it has one size, else "MRL-E" if tied, else "MRL".

    " scaled", " weighted" and " distilled" are added for `HeadConfig`'s scaled, weights and self_distillation.
    """
    if len(nesting_list) == 1:
        return "FF"
    more = {"scaled": head.scaled, "weighted": head.weights is not None, "distilled": head.self_distillation > 0}
    return " ".join(["MRL-E" if head.tied else "MRL", *(word for word, is_so in more.items() if is_so)])


def method_order(method: str) -> tuple[int, str]:
    """Return a sort key that puts the paper's methods first, in its order, and then others by name."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number."""

    study: str  # the experiment, e.g. "classification"
    dataset: str  # the evaluated data
    run: str  # the trained model
    method: str  # one of `METHODS`, or a baseline's name
    dim: int | None = None  # prefix size; None if several are in use (adaptive retrieval)
    shortlist_dim: int | None = None  # adaptive retrieval: prefix size of the first search
    shortlist_size: int | None = None  # adaptive retrieval, quantization: number of neighbors that it passes on
    rerank_dim: int | None = None  # adaptive retrieval, quantization: prefix size of the last reranking
    code: str | None = None  # quantization: how a prefix is stored, e.g. "int8"; see `mrl.retrieval.quantization`
    group: str | None = None  # the class, superclass or trend that the row is about; None for all images
    metric: str  # e.g. "top_1"
    value: float  # in [0, 1]; for a metric whose name begins with "cosine", in [-1, 1]
    cost: float | None = None  # million multiply-adds per query of a search; None outside retrieval, and for codes
    expected_dim: float | None = None  # mean prefix size per image if it differs between images
    # CPU milliseconds per query for the operations that ``cost`` counts, all queries in one batch.
    ms_per_query: float | None = None
    bytes: int | None = None  # quantization: bytes per vector that a search reads
    n: int  # number of images that ``value`` is a mean over
    seed: int  # of the training run
    resize_px: int  # shorter side of an image after resizing
    crop_px: int  # side of its center crop
    flip: bool  # whether the logits of the mirrored image were added

    def __post_init__(self) -> None:
        lowest = -1 if self.metric.startswith("cosine") else 0
        if not (isinstance(self.value, int | float) and lowest <= self.value <= 1):
            which = f"{self.metric} of {self.run} ({self.study})"
            raise UserError(f"{which} is {self.value!r}; allowed are values from {lowest} to 1")


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


def span(values: Collection[Any], form: Callable[[Any], str] = "{:,}".format) -> str:
    """Return "lowest to highest" of some numbers, or the one number if they all look the same."""
    return " to ".join(dict.fromkeys(map(form, (min(values), max(values)))))


def markdown(table: Iterable[Iterable[object]], rule: str = "---") -> str:
    """Return a table in Markdown; its first line is the head, and ``rule`` stands below each column of that."""
    head, *lines = [[str(cell).replace("|", "\\|") for cell in line] for line in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, [rule] * len(head), *lines))


def write_rows(rows: Iterable[Row], path: str | Path) -> None:
    """Write rows to ``path``, one JSON object a line, and those of single classes to classes.csv beside it."""
    lines, of_classes = [], []
    for row in rows:
        if row.study == CLASS_STUDY and row.dim is not None:
            of_classes.append(vars(row))
        else:
            lines.append(json.dumps(vars(row)) + "\n")
    classes_file = Path(path).with_name(CLASSES_FILE)
    if of_classes:
        atomic_write_text(classes_file, pd.DataFrame(of_classes)[_CLASS_COLUMNS].to_csv(index=False))
    else:
        classes_file.unlink(missing_ok=True)
    atomic_write_text(Path(path), "".join(lines))


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows that `write_rows` wrote: those in ``path``, then those in classes.csv beside it, if it exists."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist, so there are no results to read")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            try:
                rows.append(Row(**json.loads(line)))  # files that are older than a column lack its key
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}, line {number} is not a row: {error}") from error
    classes_file = path.with_name(CLASSES_FILE)
    if not classes_file.is_file():
        return rows
    # A class may be called "1", "NA" or "true".
    types = {field.name: field.type.split()[0] for field in dataclasses.fields(Row)}
    try:
        table = pd.read_csv(classes_file, dtype=types, keep_default_na=False)
        if list(table.columns) != _CLASS_COLUMNS:
            raise ValueError(f"it has {', '.join(table.columns)}")
        return rows + [Row(**values) for values in table.to_dict("records")]
    except ValueError as error:
        needed = ", ".join(_CLASS_COLUMNS)
        raise UserError(f"{classes_file} must be a table with the columns {needed}, but {error}") from error


def text_table(rows: Sequence[Row]) -> str:
    """Return tables in percent, one per dataset, study and metric: a line per method and run, a column per dim."""
    of_all_images = [vars(row) for row in rows if row.dim is not None and row.group is None]
    if not of_all_images:
        return ""
    tables = []
    for names, group in pd.DataFrame(of_all_images).groupby(["dataset", "study", "metric"], sort=False):
        percent = 100 * group.pivot_table("value", ["method", "run"], "dim", aggfunc="last")
        percent = percent.loc[sorted(percent.index, key=lambda name: (method_order(name[0]), name[1]))]
        text = percent.rename_axis(columns=None).to_string(float_format="{:.2f}".format, na_rep="-", sparsify=False)
        tables.append("{}: {}, {} (%)".format(*names) + f", n = {span(group['n'])}\n{text}")
    return "\n\n".join(tables)
