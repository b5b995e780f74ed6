"""Train a grid of models, evaluate them, and write which of the paper's effects hold, with one command.

    python -m experiments.reproduce --grid b --list                 # the runs, their state and the time they still need
    python -m experiments.reproduce --grid b --jobs 2               # the small grid: 2 CPU cores, about two hours
    python -m experiments.reproduce --grid a --jobs 2               # the large grid: one GPU, two runs at a time
    python -m experiments.reproduce --grid b --epochs 1 --seeds 0   # to try it out; the results stay beside the runs

Tiny-ImageNet comes from python -m mrl.data.prepare_tiny_imagenet. Finished runs are passed over, others go on from
their last checkpoint. Ctrl-C lets the runs save and stop; the same command goes on. A run that fails is reported, the
others go on, and the exit status is 1. At the end all runs that have finished are evaluated (eval.py),
group by group; rows, provenance, tables and figures go to results/tiny_imagenet, and README.md and docs/RESULTS.md are
brought up to date (python -m experiments.report). The time that --list tells goes by finished runs of the same backbone
and, before there are any, by the speed that the grid's file assumes.

A run directory takes about 0.3 GB (ResNet-50), and its embeddings 1 GB for 100,000 images of 2048 dims.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.grids import Grid, make_subset, read_grid
from experiments.report import DOCUMENTS, RESULTS, publish, write_report
from experiments.run_state import list_runs, read_state
from experiments.scheduler import REPOSITORY, Outcome, Scheduler
from mrl.errors import UserError


def reproduce(args: argparse.Namespace) -> int:
    """Train, evaluate, report; returns the exit status."""
    trying = args.epochs is not None or args.seeds is not None
    name = Path(args.grid).stem + (f"_{args.epochs}_epochs" if args.epochs else "")
    runs_dir = args.runs or Path("runs") / f"grid_{name}"
    out = args.out or (runs_dir / "results" if trying or args.grid not in ("a", "b") else RESULTS)
    grid = read_grid(args.grid, runs_dir, args.data, args.seeds, args.epochs)
    wanted = [run for run in grid.runs if any(fnmatch.fnmatch(run.name, pattern) for pattern in args.only)]
    if not wanted:
        raise UserError(f"--only {' '.join(args.only)} fits no run; runs: {', '.join(run.name for run in grid.runs)}")
    if args.list:
        print(list_runs(grid, [run.name for run in wanted], {run.name: read_state(run) for run in grid.runs}))
        return 0
    if grid.subset_every is not None and args.data is None:
        raise UserError(f"--grid {args.grid} takes a part of prepared images; give their folder: --data DIR")
    if args.data is not None:
        make_subset(grid, args.data)
    outcome = Scheduler(wanted, args.jobs).train_all()
    if outcome.stopped_by:
        report_failures(outcome, [])
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + outcome.stopped_by
    failed = evaluate(grid, runs_dir / "eval", out, args.few_shot)
    report_failures(outcome, failed)
    return int(bool(outcome.failed or failed))


def evaluate(grid: Grid, evaluated: Path, out: Path, few_shot: Sequence[Path]) -> list[str]:
    """Evaluate and publish the finished runs of every group, then write the report; returns the groups that failed."""
    failed = []
    for group in grid.groups:
        finished = {run.name: run for run in grid.members(group) if read_state(run).word == "finished"}
        left_out = [run.name for run in grid.members(group) if run.name not in finished]
        if left_out:
            print(f"{group}: without {len(left_out)} runs that have not finished: {', '.join(left_out)}")
        if not any(run.group == group for run in finished.values()):
            continue
        runs = list(finished.values())
        words = ["--runs", *(str(run.directory) for run in runs), "--out", str(evaluated / group)]
        words += ["--precision", grid.eval_precision]
        if grid.superclasses is not None:
            words += ["--superclasses", str(grid.superclasses)]
        if few_shot:
            words += ["--few_shot", *map(str, few_shot)]
        code = subprocess.run([sys.executable, str(REPOSITORY / "eval.py"), *words], check=False).returncode
        if code:
            print(f"{group}: eval.py ended with exit status {code}", file=sys.stderr)
            failed.append(group)
            continue
        publish(evaluated / group, runs, grid.title, out / group)
    for path in write_report(out, DOCUMENTS if out.resolve() == RESULTS else ()):
        print(f"written: {path}")
    return failed


def report_failures(outcome: Outcome, groups: Sequence[str]) -> None:
    """Say on stderr what failed, for whoever reads only the end."""
    for name, reason in outcome.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    for group in groups:
        print(f"failed: evaluation of {group}", file=sys.stderr)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--grid", required=True, metavar="a|b|FILE", help="a: ResNet-50, for a GPU; b: small, for a CPU; or a YAML file"
    )
    add("--list", action="store_true", help="show the runs, their state and the time they still need; start nothing")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="only runs of these names, e.g. 'r50_ff*_seed0'")
    add("--jobs", type=int, default=1, help="runs at a time, spread over the visible GPUs; default: 1")
    add("--epochs", type=int, help="passes over the data of every run, to try it out; default: the recipes'")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="instead of the seeds of every entry that has several")
    add("--data", type=Path, metavar="DIR", help="prepared images (train/ and val/); default: data/tiny_imagenet")
    add("--runs", type=Path, metavar="DIR", help="folder of the run directories; default: runs/grid_<name>")
    add("--out", type=Path, metavar="DIR", help="where results go; default: results/tiny_imagenet, or <runs>/results")
    add("--few_shot", type=Path, nargs="+", default=[], metavar="DIR", help="further images for E10, in class folders")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; allowed: 1 or more")
    if args.epochs is not None and args.epochs < 1:
        raise UserError(f"--epochs is {args.epochs}; allowed: 1 or more")
    if args.data is None and args.grid in ("a", "b"):
        args.data = Path("data/tiny_imagenet")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; returns the exit status."""
    try:
        return reproduce(parse(argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("killed; the same command goes on from the last checkpoints", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
