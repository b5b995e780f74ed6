"""Grids of training runs as data: a YAML file in, the command line of every run out.

A grid file holds ``title``, ``train_images`` (images of an epoch), ``runs``, and perhaps ``set`` (settings of all
runs), ``subset`` (``every`` so many classes, in sorted order, as a folder ``name``), ``images_per_second_at_64_px``,
``references`` (further runs to evaluate with a group), ``superclasses`` (a table beside the file) and
``eval_precision`` (for both see eval.py).
An entry of ``runs`` holds ``name``, ``group`` (runs that are evaluated together), ``recipe``, ``seeds``, and perhaps
``dims`` (a fixed-feature run of each size), ``set`` and ``init_from`` (a run of the grid whose weights it begins with).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mrl.config import Config, parse_command_line
from mrl.errors import UserError

GRIDS = Path(__file__).resolve().parent / "grids"
NEEDED_KEYS = {"title", "train_images", "runs"}
GRID_KEYS = NEEDED_KEYS | {
    "images_per_second_at_64_px",
    "subset",
    "set",
    "references",
    "superclasses",
    "eval_precision",
}
RUN_KEYS = {"name", "group", "recipe", "seeds", "dims", "set", "init_from"}
SPLITS = ("train", "val")


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Attributes:
        name: Of its directory.
        group: Runs of one group are evaluated together.
        words: The command line of train.py.
        config: What that resolves to.
        needs: Name of the run that must have finished before; None where there is none.
    """

    name: str
    group: str
    words: tuple[str, ...]
    config: Config
    needs: str | None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir) / self.config.run.name


@dataclass(frozen=True)
class Grid:
    """Runs and what is known of them before they ran.

    Attributes:
        title: What the runs are of, for headings.
        runs: In the order in which they start.
        train_images: Images of an epoch.
        images_per_second_at_64_px: Assumed speed of training; None where nobody knows it.
        data_root: The images that the runs train on; None where the recipes say.
        references: ``{group: names of runs of other groups}`` to evaluate with it.
        superclasses: Table for eval.py; None where there is none.
        eval_precision: Of the forward pass that embeds, for eval.py.
        subset_every: ``data_root`` is to hold every so many classes of the prepared images; None: it is them.
    """

    title: str
    runs: tuple[PlannedRun, ...]
    train_images: int
    images_per_second_at_64_px: float | None
    data_root: Path | None
    subset_every: int | None
    references: dict[str, list[str]]
    superclasses: Path | None
    eval_precision: str = "fp32"

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, in order."""
        return tuple(dict.fromkeys(run.group for run in self.runs))

    def members(self, group: str) -> list[PlannedRun]:
        """The runs to evaluate together."""
        return [run for run in self.runs if run.group == group or run.name in self.references.get(group, [])]


def read_grid(
    name: str, runs_dir: Path, data: Path | None, seeds: Sequence[int] | None = None, epochs: int | None = None
) -> Grid:
    """The grid ``a`` or ``b``, or that of a YAML file.

    Args:
        name: See above.
        runs_dir: Folder of the run directories.
        data: Prepared images to train on instead of the recipes' own.
        seeds: Instead of those of every entry that has several; runs that begin with one that is gone go too.
        epochs: Instead of those of every run; the warm-up shrinks or grows with them.

    Raises:
        UserError: There is no such grid, it has other keys than the module says, two runs have one name, a run begins
            with weights of a run that the grid lacks, or train.py would refuse a run's settings.
    """
    path = GRIDS / f"{name}.yaml" if name in ("a", "b") else Path(name)
    if not path.is_file():
        raise UserError(f"--grid {name!r} is not a file; allowed: a, b, or a YAML file of a grid")
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _check_keys(facts, NEEDED_KEYS, GRID_KEYS, str(path))
    subset = facts.get("subset")
    root = data if subset is None else runs_dir / "data" / subset["name"]
    shared = dict(facts.get("set") or {}) | ({} if root is None else {"data.root": str(root)})
    placed = []
    for entry in facts["runs"]:
        _check_keys(entry, {"name", "group", "recipe", "seeds"}, RUN_KEYS, f"{path}, runs")
        of_entry = seeds if seeds and len(entry["seeds"]) > 1 else entry["seeds"]
        for dim in entry.get("dims", [None]):
            for place, seed in enumerate(of_entry):
                placed.append((place, _planned(entry, dim, seed, shared, runs_dir, epochs)))
    # First seeds first: a grid that is stopped half-way has whole comparisons. Elsewhere the file's order stays.
    runs = [run for _, run in sorted(placed, key=lambda pair: pair[0])]
    references = facts.get("references") or {}
    if seeds:  # other seeds may leave out what runs begin with or are shown beside
        names = {run.name for run in runs}
        runs = [run for run in runs if run.needs is None or run.needs in names]
        references = {group: [name for name in of_group if name in names] for group, of_group in references.items()}
        references = {group: of_group for group, of_group in references.items() if group in {run.group for run in runs}}
    every = None if subset is None else subset["every"]
    table = facts.get("superclasses")
    grid = Grid(
        title=facts["title"],
        runs=tuple(runs),
        train_images=facts["train_images"],
        images_per_second_at_64_px=facts.get("images_per_second_at_64_px"),
        data_root=root,
        subset_every=every,
        references=references,
        superclasses=None if table is None else path.parent / table,
        eval_precision=facts.get("eval_precision", "fp32"),
    )
    _check_names(grid, path)
    return grid


def _planned(
    entry: dict[str, Any], dim: int | None, seed: int, shared: dict[str, Any], runs_dir: Path, epochs: int | None
) -> PlannedRun:
    name = f"{entry['name']}{dim or ''}_seed{seed}"
    settings = shared | (entry.get("set") or {})
    settings |= {} if dim is None else {"head.nesting_list": [dim]}
    needs = entry.get("init_from")
    settings |= {} if needs is None else {"model.init": str(runs_dir / needs)}
    settings |= {"run.seed": seed, "run.name": name, "run.dir": str(runs_dir), "run.resume": "auto"}
    words = ["--config", entry["recipe"]]
    for key, value in settings.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    try:
        config = parse_command_line(words, "")
        if epochs is not None:
            warmup = config.optim.warmup_epochs * epochs / config.train.epochs
            words += ["--train.epochs", str(epochs), "--optim.warmup_epochs", str(warmup)]
            config = parse_command_line(words, "")
    except UserError as error:
        raise UserError(f"run {name}: {error}") from error
    return PlannedRun(name, entry["group"], tuple(words), config, needs)


def _check_keys(facts: Any, needed: set[str], allowed: set[str], place: str) -> None:
    if not isinstance(facts, dict) or not needed <= facts.keys() <= allowed:
        found = sorted(map(str, facts)) if isinstance(facts, dict) else type(facts).__name__
        raise UserError(f"{place}: found {found}; needed are {sorted(needed)}, allowed {sorted(allowed)}")


def _check_names(grid: Grid, path: Path) -> None:
    names = [run.name for run in grid.runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: several runs are called {', '.join(twice)}; give each its own name")
    for i, run in enumerate(grid.runs):
        if run.needs is not None and run.needs not in names[:i]:
            raise UserError(f"{path}: {run.name} begins with the weights of {run.needs}, which is no run before it")
    unknown = {name for of_group in grid.references.values() for name in of_group} - set(names)
    if unknown or not grid.references.keys() <= set(grid.groups):
        raise UserError(f"{path}: references {grid.references} must map groups {list(grid.groups)} to names of runs")


def make_subset(grid: Grid, data: Path) -> None:
    """Fill the grid's ``data_root`` with links to every so many classes of ``data``, unless it is there or not wanted.

    Raises:
        UserError: ``data`` has no train and val folders.
    """
    out = grid.data_root
    if grid.subset_every is None or out is None or out.exists():
        return
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    for split in SPLITS:
        if not (data / split).is_dir():
            raise UserError(f"--data {data} has no folder {split}; python -m mrl.data.tiny_imagenet makes it")
        (unfinished / split).mkdir(parents=True)
        classes = sorted(entry.name for entry in (data / split).iterdir() if entry.is_dir())
        for name in classes[:: grid.subset_every]:
            (unfinished / split / name).symlink_to((data / split / name).resolve())
    unfinished.rename(out)
