"""Train a grid of models, evaluate them, and report which of the paper's effects hold.

    python -m experiments.reproduce --grid b --list                 # the runs, their state, the time left
    python -m experiments.reproduce --grid b --jobs 2               # the small grid: 2 CPU cores, about four hours
    python -m experiments.reproduce --grid c_sweep --jobs 2         # learning rates for fine-tuning a last layer
    python -m experiments.reproduce --grid a --jobs 2               # the large grid: one GPU, two runs at a time
    python -m experiments.reproduce --grid b --epochs 1 --seeds 0   # a trial; its results stay beside the runs

Prepare Tiny-ImageNet first (python -m mrl.data.tiny_imagenet). Ctrl-C lets the runs save a checkpoint and stop. The
same command skips finished runs and resumes the others; do not start it twice at the same time. If a run fails, the
others continue, and the exit status is 1. Finished runs are then evaluated group by group (eval.py). Rows, provenance,
tables and figures go to <runs>/results; those of a complete grid go to results/tiny_imagenet, and the generated parts
of README.md and docs/RESULTS.md are updated.

A run directory takes about 0.3 GB (ResNet-50), and its embeddings 1 GB per 100,000 images of 2048 dims.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import ArgumentError, ArgumentParser
from tqdm import tqdm

from experiments.learning_rates import write_sweep
from experiments.report import DOCUMENTS, PROVENANCE, REPOSITORY, RESULTS, ROWS, duration, write_report
from mrl import distributed
from mrl.config import Config, parse_command_line, to_yaml
from mrl.errors import UserError
from mrl.progress import progress
from mrl.results import CLASS_STUDY, read_rows, write_rows
from mrl.rundir import atomic_write_text, check_settings, read_metrics
from mrl.training.logging import StopSignals

GRIDS = Path(__file__).resolve().parent / "grids"
TRAIN = (sys.executable, str(REPOSITORY / "train.py"))
POLL_SECONDS, REFRESH_SECONDS = 0.2, 5.0
# Arguments of train.py that are not among the settings in provenance.json, which holds no paths.
PLACES = ("--config", "--run.name", "--run.seed", "--run.dir", "--run.resume", "--data.root", "--model.init")


@dataclass(frozen=True)
class Entry:
    """Runs of one recipe in a grid file: one per seed, and per size if there are ``dims``."""

    name: str
    group: str  # runs of one group are evaluated together
    recipe: str
    seeds: list[int]
    dims: list[int] | None = None  # a fixed-feature run of each size
    lrs: list[float] | None = None  # a run at each learning rate: the grid is a sweep
    set: dict[str, Any] = field(default_factory=dict)  # settings that differ from the recipe: {train.epochs: 5}
    init_from: str | None = None  # an earlier run of the grid to take the weights from


@dataclass(frozen=True)
class Grid:
    """The keys of a grid file."""

    title: str
    runs: list[Entry]
    set: dict[str, Any] = field(default_factory=dict)  # settings of all runs
    subset: str | None = None  # folder name of a subset of the prepared images to train on
    every_nth_class: int = 1  # which classes the subset has
    hold_out_every_nth: int = 0  # training images of each class to validate on in place of the validation images
    references: dict[str, list[str]] = field(default_factory=dict)  # {group: other runs to evaluate with it}
    superclasses: str | None = None  # table for eval.py, beside the grid file
    evaluation: list[str] = field(default_factory=list)  # further options of eval.py: [--precision, bf16]
    minutes_per_epoch: float | None = None  # what --list assumes until a run of the same backbone has finished


@dataclass(frozen=True)
class Run:
    """A planned run: its name, its entry in the grid, the argv of train.py and the resulting config."""

    name: str
    entry: Entry
    argv: tuple[str, ...]
    config: Config

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir) / self.name

    def rows(self, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Return the rows of a log in the run directory."""
        return read_metrics(self.directory, file)

    def epochs_done(self) -> float:
        """Return the epochs trained so far, with fractions."""
        return max((row["epoch"] for row in self.rows()), default=0.0)

    def seconds(self) -> float:
        """Return the wall time of training, summed over all starts."""
        return sum(row["seconds"] for row in self.rows("attempts.jsonl"))

    def is_finished(self) -> bool:
        """Return whether the model is saved and its last epoch validated; raise if the run has other settings."""
        if (self.directory / "config.yaml").is_file():
            # Defaults may come from a run that was not there yet when the grid was planned.
            now = parse_command_line(self.argv, "") if self.entry.init_from else self.config
            check_settings(self.directory, to_yaml(now), to_yaml(Config()), "remove it, or give another --runs")
        last = [row for row in self.rows() if row["epoch"] >= self.config.train.epochs]
        validated = any(key.startswith("top_1/") for row in last for key in row)
        return validated and (self.directory / "model.safetensors").is_file()


def read_grid(name: str) -> Grid:
    """Read a grid of this package by its name, or a grid file.

    Raises:
        UserError: There is no such file, it is not YAML, or a key is missing, unknown or of the wrong type.
    """
    shipped = {path.stem: path for path in sorted(GRIDS.glob("*.yaml"))}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise UserError(
            f"--grid is {name!r}, which is not a file; allowed: {', '.join(shipped)}, or the YAML file of a grid"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Grid)
    try:
        grid = Grid(**parser.instantiate(parser.parse_string(path.read_text(encoding="utf-8"))).as_dict())
    except ArgumentError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    return replace(grid, superclasses=grid.superclasses and str(path.parent / grid.superclasses))


def plan(
    grid: Grid, runs_dir: Path, data: Path | None, seeds: Sequence[int] | None = None, epochs: int | None = None
) -> list[Run]:
    """Return the runs of a grid, first seeds first, so that a grid that is stopped early has complete comparisons.

    ``data`` replaces the images of the recipes, ``epochs`` the epochs of every run, and ``seeds`` the seeds of entries
    with several; runs that would start from a run of another seed are then left out.

    Raises:
        UserError: A name is not unique or unknown, or train.py would refuse the settings of a run.
    """
    shared = grid.set | ({"data.root": str(data)} if data else {})
    placed = [
        (place, _plan_run(entry, dim, lr, seed, shared, runs_dir, epochs))
        for entry in grid.runs
        for dim in (entry.dims or (None,))
        for lr in (entry.lrs or (None,))
        for place, seed in enumerate(seeds if seeds and len(entry.seeds) > 1 else entry.seeds)
    ]
    runs = [run for _, run in sorted(placed, key=lambda pair: pair[0])]
    names = [run.name for run in runs]
    if seeds:
        return [run for run in runs if run.entry.init_from in (None, *names)]
    for i, run in enumerate(runs):
        if run.name in names[:i]:
            raise UserError(f"two runs of the grid are called {run.name}; names must be unique")
        if run.entry.init_from not in (None, *names[:i]):
            raise UserError(f"{run.name} starts from {run.entry.init_from}, which is not a run before it")
    for group, listed in grid.references.items():
        if group not in {run.entry.group for run in runs} or not set(listed) <= set(names):
            raise UserError(f"references of the grid: {group} must be a group, and {', '.join(listed)} names of runs")
    return runs


def _plan_run(
    entry: Entry,
    dim: int | None,
    lr: float | None,
    seed: int,
    shared: dict[str, Any],
    runs_dir: Path,
    epochs: int | None,
) -> Run:
    name = f"{entry.name}{dim or ''}{f'_lr{lr:g}' if lr else ''}_seed{seed}"
    settings = shared | entry.set
    settings |= {"head.nesting_list": [dim]} if dim else {}
    settings |= {"optim.lr": lr} if lr else {}
    settings |= {"model.init": str(runs_dir / entry.init_from)} if entry.init_from else {}
    settings |= {"run.seed": seed, "run.name": name, "run.dir": str(runs_dir), "run.resume": "auto"}
    argv = ["--config", entry.recipe]
    for key, value in settings.items():
        argv += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    try:
        config = parse_command_line(argv, "")
        if epochs is not None:
            warmup_epochs = config.optim.warmup_epochs * epochs / config.train.epochs
            argv += ["--train.epochs", str(epochs), "--optim.warmup_epochs", str(warmup_epochs)]
            config = parse_command_line(argv, "")
    except UserError as error:
        raise UserError(f"run {name}: {error}") from error
    return Run(name, entry, tuple(argv), config)


def make_subset(data: Path, grid: Grid, out: Path) -> None:
    """Fill ``out`` with links to the images of ``data`` that a grid trains on.

    With ``hold_out_every_nth``, val holds every n-th training image of each class in sorted order, and train the rest.
    """
    for split in ("train", "val"):
        if not (data / split).is_dir():
            raise UserError(f"--data {data} has no folder {split}; python -m mrl.data.tiny_imagenet makes it")
        shutil.rmtree(out / split, ignore_errors=True)  # links of another grid's split, or to images that are gone
        (out / split).mkdir(parents=True)
        source, every = data / ("train" if grid.hold_out_every_nth else split), grid.hold_out_every_nth
        for folder in sorted(path for path in source.iterdir() if path.is_dir())[:: grid.every_nth_class]:
            link, folder = out / split / folder.name, folder.resolve()
            if not every:
                link.symlink_to(folder)
                continue
            link.mkdir()
            for i, name in enumerate(sorted(os.listdir(folder))):
                if (i % every == 0) == (split == "val"):
                    (link / name).symlink_to(folder / name)


def train_all(runs: Sequence[Run], jobs: int, command: Sequence[str] = TRAIN) -> tuple[dict[str, str], int]:
    """Train the unfinished runs in order, ``jobs`` at a time, each in a child process with its argv.

    After SIGINT or SIGTERM the children save a checkpoint and end, and no others start.

    Returns:
        ``{name: reason}`` of the runs that failed, and the number of the signal that stopped the training or 0.
    """
    futures: dict[str | None, Future[str | None]] = {}
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for environment in slot_environments(jobs):
        slots.put(environment)

    def train(run: Run) -> str | None:
        needed = futures.get(run.entry.init_from)
        if needed and needed.result():
            return f"it starts from {run.entry.init_from}, which failed"
        if received:
            return None
        slot, started, log = slots.get(), time.monotonic(), run.directory / "train.log"
        tqdm.write(f"{run.name} {'resumes' if run.rows() else 'starts'}; log: {log}")
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                process = subprocess.Popen([*command, *run.argv], stdout=file, stderr=file, env=os.environ | slot)
                while process.poll() is None and not received:
                    time.sleep(POLL_SECONDS)
                if received:
                    process.terminate()
                code = process.wait()
        except OSError as error:  # e.g. a full disk
            return str(error)
        finally:
            slots.put(slot)
        with (run.directory / "attempts.jsonl").open("a", encoding="utf-8") as attempts:
            attempts.write(json.dumps({"seconds": round(time.monotonic() - started, 3), "exit": code}) + "\n")
        finished = code == 0 and run.is_finished()
        tqdm.write(f"{run.name} {'finished' if finished else 'stopped'} after {run.epochs_done():.2f} epochs")
        if finished or received:
            return None
        ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"train.py {ending}; last line of {log}: {lines[-1] if lines else ''}"

    total = sum(run.config.train.epochs for run in runs)
    unfinished = [run for run in runs if not run.is_finished()]  # raises before anything starts
    with StopSignals() as received, ThreadPoolExecutor(jobs) as pool, progress(total=total, unit="epoch") as bar:
        for run in unfinished:
            futures[run.name] = pool.submit(train, run)
        while wait(futures.values(), REFRESH_SECONDS).not_done:
            bar.update(sum(run.epochs_done() for run in runs) - bar.n)
    failed = {str(name): reason for name, future in futures.items() if (reason := future.result())}
    return failed, received.number


def slot_environments(jobs: int) -> list[dict[str, str]]:
    """Return the environment variables of ``jobs`` children: one of the visible GPUs each, or a share of the cores."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs)]
    return [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}] * jobs


def list_runs(runs: Sequence[Run], wanted: Sequence[Run], minutes_per_epoch: float | None) -> str:
    """Return a table of the runs in ``wanted``: state, time trained, time left at the speed of finished runs."""
    table, total = pd.DataFrame(columns=["run", "group", "state", "trained for", "time left"]), 0.0
    finished = [run for run in runs if run.is_finished()]
    for run in wanted:
        same = [other for other in finished if other.config.model.backbone == run.config.model.backbone]
        epochs = sum(other.config.train.epochs for other in same)
        speed = sum(other.seconds() for other in same) / epochs if same else 60 * (minutes_per_epoch or math.nan)
        done = run.epochs_done() / run.config.train.epochs
        state = "finished" if run in finished else f"{done:.0%} done" if done else "not started"
        left = (1 - done) * run.config.train.epochs * speed
        total += left
        table.loc[len(table)] = [run.name, run.entry.group, state, duration(run.seconds()), duration(left)]
    return f"{table.to_string(index=False)}\n{len(wanted)} runs; training left, added up: {duration(total)}"


def evaluate(grid: Grid, runs: Sequence[Run], few_shot: Sequence[Path], evaluated: Path, out: Path) -> list[str]:
    """Evaluate and publish the finished runs of every group; return a message for each group that failed."""
    options = [*grid.evaluation]
    options += ["--superclasses", grid.superclasses] if grid.superclasses else []
    options += ["--few_shot", *map(str, few_shot)] if few_shot else []
    problems = []
    for group in dict.fromkeys(run.entry.group for run in runs):
        members = [run for run in runs if run.entry.group == group or run.name in grid.references.get(group, [])]
        finished = [run for run in members if run.is_finished()]
        if len(finished) < len(members):
            print(f"{group}: leaving out {', '.join(run.name for run in members if run not in finished)}: not finished")
        if not any(run.entry.group == group for run in finished):
            continue
        command = [sys.executable, str(REPOSITORY / "eval.py"), "--runs", *(str(run.directory) for run in finished)]
        if subprocess.run([*command, "--out", str(evaluated / group), *options], check=False).returncode:
            problems.append(f"failed: evaluation of {group}")
        else:
            publish(evaluated / group, finished, grid.title, out / group)
    return problems


def publish(evaluated: Path, runs: Sequence[Run], title: str, out: Path) -> None:
    """Copy the rows of eval.py into ``out``, except those of single classes, with the provenance of the runs."""
    out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(evaluated / ROWS)
    write_rows([row for row in rows if row.study != CLASS_STUDY or row.dim is None], out / ROWS)
    evaluation = json.loads((evaluated / PROVENANCE).read_text(encoding="utf-8"))
    evaluation = {key: value for key, value in evaluation.items() if key not in ("command", "runs")}
    record = {"title": title, "evaluation": evaluation, "runs": {run.name: provenance_of(run) for run in runs}}
    atomic_write_text(out / PROVENANCE, json.dumps(record, indent=2) + "\n")


def provenance_of(run: Run) -> dict[str, Any]:
    """Return recipe, settings, hardware, versions, speed and time of a finished run, without paths."""
    starts = json.loads((run.directory / PROVENANCE).read_text(encoding="utf-8"))
    last = {key: value for key, value in starts[-1].items() if key not in ("command", "folder", "start_step")}
    pairs = zip(run.argv[::2], run.argv[1::2], strict=True)
    settings = [f"{key} {value}" for key, value in pairs if key not in PLACES]
    settings += [f"--model.init {run.entry.init_from}"] if run.entry.init_from else []
    logged = [row for row in run.rows() if "images_per_second" in row]
    return {
        "recipe": Path(run.argv[1]).stem,
        "settings": " ".join(settings),
        "seed": run.config.run.seed,
        "hardware": ", ".join(last["gpus"]) or f"CPU {last['cpu']}",
        "images_per_second": statistics.median(row["images_per_second"] for row in logged),
        "data_wait": statistics.median(row["data_wait"] for row in logged),
        "seconds": run.seconds(),
        "starts": len(starts),
        **last,
    }


def reproduce(args: argparse.Namespace) -> int:
    """Train, evaluate and report; return the exit status."""
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; allowed: 1 or more")
    grid, shipped = read_grid(args.grid), args.grid != "digits" and (GRIDS / f"{args.grid}.yaml").is_file()
    runs_dir = args.runs or Path(f"runs/grid_{Path(args.grid).stem}{f'_{args.epochs}_epochs' if args.epochs else ''}")
    data = args.data or (Path("data/tiny_imagenet") if shipped else None)
    root = runs_dir / "data" / grid.subset if grid.subset else data
    runs = plan(grid, runs_dir, root, args.seeds, args.epochs)
    wanted = [run for run in runs if any(fnmatch.fnmatch(run.name, pattern) for pattern in args.only)]
    if not wanted:
        raise UserError(f"--only {' '.join(args.only)} matches no run; runs: {', '.join(run.name for run in runs)}")
    if args.list:
        print(list_runs(runs, wanted, grid.minutes_per_epoch))
        return 0
    if grid.subset and root:
        if data is None:
            raise UserError(f"--grid {args.grid} trains on a subset of prepared images; give their folder: --data DIR")
        make_subset(data, grid, root)

    failed, stopped_by = train_all(wanted, args.jobs)
    problems = [f"failed: {name}: {reason}" for name, reason in failed.items()]
    finished = [run for run in runs if run.is_finished()]
    whole = shipped and not args.epochs and not args.seeds and len(finished) == len(runs)
    out = args.out or (RESULTS if whole else runs_dir / "results")
    if stopped_by:
        problems.append("stopped; the same command resumes")
    elif any(entry.lrs for entry in grid.runs):
        for path in write_sweep(finished, args.out or out / grid.runs[0].group) if finished else ():
            print(f"written: {path}")
    else:
        problems += evaluate(grid, runs, args.few_shot, runs_dir / "eval", out)
        for path in write_report(out, DOCUMENTS if out.resolve() == RESULTS else ()):
            print(f"written: {path}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 128 + stopped_by if stopped_by else int(bool(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; return the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--grid", required=True, metavar="NAME|FILE", help="a file name in experiments/grids, or a path")
    add("--list", action="store_true", help="show the runs, their state and the time left; start nothing")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="only runs with these names, e.g. 'r50_ff*_seed0'")
    add("--jobs", type=int, default=1, help="runs at a time, spread over the visible GPUs; default: 1")
    add("--epochs", type=int, help="epochs of every run, for a trial; default: the recipes'")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="seeds of every entry that has several")
    add("--data", type=Path, metavar="DIR", help="prepared images (train/ and val/); default: data/tiny_imagenet")
    add("--runs", type=Path, metavar="DIR", help="folder of the run directories; default: runs/grid_<name>")
    add("--out", type=Path, metavar="DIR", help="default: results/tiny_imagenet for a complete grid, or <runs>/results")
    add("--few_shot", type=Path, nargs="+", default=[], metavar="DIR", help="other images for E10, in class folders")
    interrupted = "stopped at once; the same command resumes from the last checkpoints"
    return distributed.run(lambda: reproduce(parser.parse_args(argv)), interrupted)


if __name__ == "__main__":
    sys.exit(main())
