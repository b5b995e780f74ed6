"""Evaluate trained runs: embeddings once, then every study as rows, tables and figures.

    python eval.py --runs runs/digits_mrl runs/digits_ff           # rows and figures in runs/eval
    python eval.py --runs runs/resnet50_mrl --out results/resnet50 --batch_size 512
    torchrun --nproc_per_node=8 eval.py --runs runs/resnet50_mrl   # the embedding pass on all GPUs
    python eval.py --runs runs/resnet50_mrl --robustness imagenet_a=DIR --few_shot DIR --retrieval QUERIES DATABASE
    python eval.py --runs runs/mine --data.root DIR                # the images are elsewhere than in training
    python eval.py --redraw runs/eval/results.jsonl                # figures again, from the rows alone
    python eval.py --checkpoint r50_mrl1_e0_ff2048.pt --data.root DIR      # a checkpoint of the authors

Embeddings stay in each run directory and are used again as long as the model, the image size, and the names of the
classes are the same; if the images have changed, give --force. After Ctrl-C, the same command continues the pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from mrl import distributed
from mrl.config import expand_home
from mrl.data.folder import unicode_name
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.figures import figures_of, save
from mrl.figures.neighbors import PICTURES
from mrl.figures.quantization import bytes_table
from mrl.interop.authors import import_checkpoint
from mrl.interop.wandb import report_evaluation
from mrl.results import Row, read_rows, text_table, write_rows
from mrl.retrieval.search import describe_zero_prefixes
from mrl.rundir import atomic_write_text, provenance
from mrl.studies.adaptive_classification import headlines
from mrl.studies.hierarchy import build_hierarchy, read_class_table
from mrl.studies.run import OpenedRun, embed_runs
from mrl.studies.suite import LONG, run_studies
from mrl.studies.transfer import TransferImages, read_folder, transfer_studies

# Settings of a run that may be given again: where its images are, and how they are read.
PLACE_SETTINGS = ("--data.root", "--data.backend", "--data.num_workers")
SHOWN = {
    "classification": ("top_1", "top_5"),
    "retrieval": ("top_1", "map@10"),
    "robustness": ("top_1",),
    "few_shot": ("top_1_1_shot", "top_1_5_shot"),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--runs", nargs="+", metavar="RUN", help="run directories of finished trainings")
    what.add_argument("--redraw", metavar="RESULTS.jsonl", help="draw figures from these rows, without any model")
    weights = "weights of the paper's authors; takes --data.root etc. too"
    what.add_argument("--checkpoint", metavar="FILE.pt", help=weights)
    parser.add_argument_group(
        "with --runs",
        "--data.root DIR: the folder of the images, if they are elsewhere than in training. --data.backend folder: "
        "read files, without FFCV. --data.num_workers N: processes that read them.",
    )
    add = parser.add_argument
    folders: Any = {"metavar": "[NAME=]DIR", "nargs": "+", "default": []}
    add("--out", metavar="DIR", help="folder for results; default: eval/ beside the first run")
    add("--title", metavar="TEXT", help="name of the runs' data in figures; default: its own; ImageNet keeps its own")
    add("--superclasses", metavar="TSV", help="a table with the columns class and superclass")
    known = "imagenet_v2, imagenet_a, imagenet_r or imagenet_sketch"
    add("--robustness", **folders, help=f"images of trained classes in class folders; NAME: {known}")
    add("--few_shot", **folders, help="images of any classes, never trained on")
    searched = "queries to find in the training images, or queries and a database; may be repeated"
    add("--retrieval", action="append", **folders, help=searched)
    add("--renaming", metavar="TSV", help="for other class folder names: a table with columns folder, trained_class")
    max_queries = "use N evenly spread queries in all retrieval studies, which is faster; default: all queries"
    add("--max_queries", type=int, metavar="N", help=max_queries)
    add("--skip", nargs="+", choices=LONG, default=[], help="leave out studies that take minutes with 100,000 images")
    add("--batch_size", type=int, help="images at a time on each process; default: 256 on a GPU, 32 on a CPU")
    precision = "precision of the forward pass; bf16 is faster on hardware that supports it; default: fp32"
    add("--precision", choices=("fp32", "bf16"), default="fp32", help=precision)
    add("--force", action="store_true", help="compute embeddings again, e.g. after image files were replaced")
    add("--wandb", choices=("disabled", "offline", "online"), default="disabled", help="log to each run's W&B run too")
    add("--wandb_artifacts", action="store_true", help="upload models and embeddings to W&B too")
    args, settings = parser.parse_known_args(expand_home(argv))
    args.settings = settings
    unknown = [word for word in settings if word.startswith("-") and not word.startswith(PLACE_SETTINGS)]
    if settings and not args.checkpoint and (not args.runs or unknown or not settings[0].startswith("-")):
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.redraw and (others := sorted(given - {"redraw", "out", "title", "settings"})):
        raise UserError(f"--{others[0]} needs --runs; --redraw only draws the rows of a file")
    if args.wandb_artifacts and args.wandb == "disabled":
        raise UserError("--wandb_artifacts uploads files to W&B, so it needs --wandb offline or --wandb online")
    for option in given & {"batch_size", "max_queries"}:
        if getattr(args, option) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}; allowed: 1 or more")
    if any(len(pair) > 2 for pair in args.retrieval):
        raise UserError("--retrieval takes one or two folders: queries, or queries and a database")
    return args


def evaluate(args: argparse.Namespace, process: Process) -> None:
    """Embed on all processes; then compute studies, write rows and draw figures on the main one."""
    out = Path(args.out or os.path.normpath(Path(args.runs[0], "..", "eval")))
    if (out / "model.json").is_file():
        raise UserError(f"--out {out} is the directory of a run, and would lose its provenance.json; give another")
    runs = name_runs([Path(run) for run in args.runs if Path(run).resolve() != out.resolve()])
    transfer = TransferImages(
        robustness=[read_folder("--robustness", text) for text in args.robustness],
        few_shot=[read_folder("--few_shot", text) for text in args.few_shot],
        retrieval=[[read_folder("--retrieval", text) for text in pair] for pair in args.retrieval],
        renaming=read_class_table(args.renaming, "trained_class") if args.renaming else {},
    )
    superclasses = read_class_table(args.superclasses, "superclass") if args.superclasses else None
    opened = embed_runs(runs, transfer, args.batch_size, args.force, process, args.precision, args.settings)
    distributed.stop()  # what follows, reading images for a picture too, is the main process's alone
    if not process.is_main:
        return
    for run in opened if superclasses else ():
        build_hierarchy(run.classes, superclasses or {})  # raises before the studies if the table is of other classes
    for run in opened:
        for images, of_split in (("validation images", run.val), ("training images", run.train)):
            if zeros := describe_zero_prefixes(of_split.vectors, run.dims, images):
                print(f"{run.source.run}: {zeros}")
    warnings.filterwarnings("ignore", "prefixes are all zero")  # of each search again
    out.mkdir(parents=True, exist_ok=True)
    record = {"command": sys.argv, "runs": {name: str(run) for name, run in runs.items()}}
    record |= {"precision": args.precision, **provenance(process.world_size)}
    atomic_write_text(out / "provenance.json", json.dumps(record, indent=2) + "\n")
    rows: list[Row] = []
    # Written after each run, so that a failure does not lose the rows of the runs before.
    for run in opened:
        rows += run_studies(run, process.device, superclasses, args.max_queries, args.skip)
        write_rows(rows, out / "results.jsonl")
    for run in opened:
        rows += transfer_studies(run, transfer, process.device, args.max_queries)
        write_rows(rows, out / "results.jsonl")
    show(rows, out, args.title)
    shown = next((run for run in opened if len(run.head.nesting_list) > 1), opened[0])
    draw_pictures(shown, out, process, args.title if shown.source.dataset == opened[0].source.dataset else None)
    print(f"rows: {out / 'results.jsonl'}")
    if args.wandb != "disabled":
        report_evaluation(runs, rows, record, args.wandb, args.wandb_artifacts)


def name_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """Return ``{name: directory}``: a run is named after its directory, with the parent's name if two are the same."""
    resolved = [run.resolve() for run in runs]
    if not runs or len(set(resolved)) < len(runs):
        raise UserError(f"--runs {' '.join(map(str, runs))}: give one or more run directories, each once")
    for run, file in itertools.product(runs, ("config.yaml", "model.json", "model.safetensors")):
        if not (run / file).is_file():
            raise UserError(f"{run} has no {file}, so it is not the directory of a run that has saved a model")
    same = Counter(run.name for run in resolved)
    names = [unicode_name(f"{run.parent.name}/{run.name}" if same[run.name] > 1 else run.name) for run in resolved]
    if len(set(names)) < len(names):
        raise UserError(f"the runs {', '.join(map(str, runs))} share a name, also with their folder; rename one")
    return dict(zip(names, runs, strict=True))


def draw_pictures(run: OpenedRun, out: Path, process: Process, title: str | None) -> None:
    """Draw neighbors among the run's own images, and its confusions, into ``out``; print their paths."""
    named = replace(run, source=replace(run.source, dataset=title or run.source.dataset))
    for name, draw in PICTURES.items():
        try:
            paths = save(draw(named, process.device), out / f"{name}_{run.source.dataset}")
            print(*(f"figure: {path}" for path in paths), sep="\n")
        except UserError as error:  # the embeddings are there, but the images are not
            print(f"no picture of {name}: {error}")


def show(rows: Sequence[Row], out: Path, title: str | None = None) -> None:
    """Print the tables, draw the figures into ``out``, and print their paths; ``title`` names the first row's data."""
    print(text_table([row for row in rows if row.metric in SHOWN.get(row.study, ())]), end="\n\n")
    for dataset in dict.fromkeys(row.dataset for row in rows):
        of_dataset = [row for row in rows if row.dataset == dataset]
        for line in headlines(of_dataset):
            print(line)
        if needed := bytes_table(of_dataset):
            print(f"\n{dataset}: bytes per vector for a share of the full 1-NN accuracy")
            print(pd.DataFrame(needed[1:], columns=needed[0]).to_string(index=False), end="\n\n")
        if title and dataset == rows[0].dataset != "imagenet":  # the paper's numbers go by that name
            of_dataset = [replace(row, dataset=title) for row in of_dataset]
        for name, figure in figures_of(of_dataset).items():
            for path in save(figure, out / f"{name}_{dataset}"):
                print(f"figure: {path}")


def main(argv: list[str] | None = None) -> int:
    """Evaluate from a command line and return the exit status."""

    def parse_and_evaluate() -> int:
        args = parse(argv)
        process = distributed.start()
        if args.checkpoint:
            args.runs = [str(import_checkpoint([args.checkpoint, *args.settings], write=process.is_main))]
            distributed.barrier()
        if args.runs:
            evaluate(args, process)
        elif process.is_main:
            rows = read_rows(args.redraw)
            if not rows:
                raise UserError(f"{args.redraw} holds no rows, so there is nothing to draw")
            show(rows, Path(args.out) if args.out else Path(args.redraw).parent, args.title)
        return 0

    return distributed.run(parse_and_evaluate, "interrupted; the same command resumes the embedding pass")


if __name__ == "__main__":
    sys.exit(main())
