"""Evaluate trained runs: embeddings once, then every study as rows, tables and figures.

    python eval.py --runs runs/digits_mrl runs/digits_ff           # rows and figures in runs/eval
    python eval.py --runs runs/resnet50_mrl --out results/resnet50 --batch_size 512
    torchrun --nproc_per_node=8 eval.py --runs runs/resnet50_mrl   # the embedding pass on all GPUs
    python eval.py --runs runs/resnet50_mrl --robustness imagenet_a=DIR --few_shot DIR --retrieval QUERIES DATABASE
    python eval.py --redraw runs/eval/results.jsonl                # figures again, from the rows alone
    python eval.py --checkpoint r50_mrl1_e0_ff2048.pt --data.root DIR      # a file of the authors, by way of a run

Embeddings of all images stay in each run directory and are used again as long as the model, the
images and their size are the same. Stop it with Ctrl-C: the same command goes on where the embedding pass stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mrl import distributed
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.figures import figures_of, save
from mrl.interop.authors import import_checkpoint
from mrl.interop.wandb import report_evaluation
from mrl.results import Row, read_rows, text_table, write_rows
from mrl.rundir import atomic_write_text, provenance
from mrl.studies.adaptive_classification import headlines
from mrl.studies.embed_runs import embed_runs
from mrl.studies.hierarchy import read_class_table
from mrl.studies.run import run_studies
from mrl.studies.transfer import TransferImages, read_folder, transfer_studies

SHOWN = {
    "classification": ("top_1", "top_5"),
    "retrieval": ("top_1", "map@10"),
    "robustness": ("top_1",),
    "few_shot": ("top_1_1_shot", "top_1_5_shot"),
}


def evaluate(args: argparse.Namespace, process: Process) -> None:
    """Embed on all processes, then study, write and draw on the main one."""
    first = Path(args.runs[0])
    beside = first.parent if first.name not in ("", "..") else first.resolve().parent
    out = Path(args.out) if args.out else beside / "eval"
    names = name_runs([Path(run) for run in args.runs if Path(run).resolve() != out.resolve()])
    further = transfer_images(args)
    table = read_class_table(args.superclasses, "superclass") if args.superclasses else None
    embedded = embed_runs(names, further, args.batch_size, args.force, process, args.precision)
    if not process.is_main:
        return
    out.mkdir(parents=True, exist_ok=True)
    record = {"command": sys.argv, "runs": {name: str(run) for name, run in names.items()}}
    record["precision"] = args.precision
    record |= provenance(process.world_size)
    atomic_write_text(out / "provenance.json", json.dumps(record, indent=2) + "\n")
    rows: list[Row] = []
    # Written run by run, so that a study that fails loses those of its own run alone.
    for run in embedded:
        rows += run_studies(run, process.device, table)
        write_rows(rows, out / "results.jsonl")
    for run in embedded:
        rows += transfer_studies(run, further, process.device)
        write_rows(rows, out / "results.jsonl")
    show(rows, out)
    print(f"rows: {out / 'results.jsonl'}")
    if args.wandb != "disabled":
        report_evaluation(names, rows, record, args.wandb, args.wandb_artifacts)


def name_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """``{name: directory}``: a run is called as its directory, with the parent's name where two are called the same.

    Raises:
        UserError: There is no run, one is given twice, lacks a file, or cannot be told from another by name.
    """
    resolved = [run.resolve() for run in runs]
    if not runs or len(set(resolved)) < len(runs):
        raise UserError(f"--runs {' '.join(map(str, runs))}: give one or more run directories, each once")
    for run in runs:
        for file in ("config.yaml", "model.json", "model.safetensors"):
            if not (run / file).is_file():
                raise UserError(f"{run} has no {file}, so it is not the directory of a run that has saved a model")
    same = Counter(run.name for run in resolved)
    names = [f"{run.parent.name}/{run.name}" if same[run.name] > 1 else run.name for run in resolved]
    if len(set(names)) < len(names):
        raise UserError(f"the runs {', '.join(map(str, runs))} share a name, also with their folder; rename one")
    return dict(zip(names, runs, strict=True))


def transfer_images(args: argparse.Namespace) -> TransferImages:
    """The images beside the runs' own that the command line names.

    Raises:
        UserError: A folder or table cannot be read, or --retrieval is not given one or two folders.
    """
    for pair in args.retrieval:
        if len(pair) > 2:
            raise UserError(f"--retrieval {' '.join(pair)}: give queries, or queries and a database")
    return TransferImages(
        robustness=[read_folder("--robustness", text) for text in args.robustness],
        few_shot=[read_folder("--few_shot", text) for text in args.few_shot],
        retrieval=[[read_folder("--retrieval", text) for text in pair] for pair in args.retrieval],
        renaming=read_class_table(args.renaming, "trained_class") if args.renaming else {},
    )


def show(rows: Sequence[Row], out: Path) -> None:
    """Print the tables, draw the figures into ``out``, and name every file there."""
    print(text_table([row for row in rows if row.metric in SHOWN.get(row.study, ())]), end="\n\n")
    for dataset in dict.fromkeys(row.dataset for row in rows):
        of_dataset = [row for row in rows if row.dataset == dataset]
        for line in headlines(of_dataset):
            print(line)
        for name, figure in figures_of(of_dataset).items():
            for path in save(figure, out / f"{name}_{dataset}"):
                print(f"figure: {path}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--runs", nargs="+", metavar="RUN", help="run directories that train.py has filled")
    what.add_argument("--redraw", metavar="RESULTS.jsonl", help="draw the figures of these rows; no model is touched")
    what.add_argument(
        "--checkpoint", metavar="FILE.pt", help="weights of the paper's authors; takes --data.root and its like too"
    )
    parser.add_argument("--out", metavar="DIR", help="where results go; default: eval/ beside the first run")
    parser.add_argument("--superclasses", metavar="TSV", help="a table with the columns class and superclass")
    parser.add_argument(
        "--robustness",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="images of trained classes in class folders; NAME: imagenet_v2, imagenet_a, imagenet_r or imagenet_sketch",
    )
    parser.add_argument(
        "--few_shot", nargs="+", default=[], metavar="[NAME=]DIR", help="images never trained on, of any classes"
    )
    parser.add_argument(
        "--retrieval",
        nargs="+",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="queries to find in the training images, or queries and a database; may be given several times",
    )
    parser.add_argument(
        "--renaming",
        metavar="TSV",
        help="for class folders of other names: a table with the columns folder and trained_class",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images at a time on each process; default: 256")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the forward pass that embeds; bf16 is faster where the hardware has it; default: fp32",
    )
    parser.add_argument("--force", action="store_true", help="embed anew, e.g. because image files were replaced")
    modes = ("disabled", "offline", "online")
    parser.add_argument("--wandb", choices=modes, default="disabled", help="log it all to each run's W&B run too")
    parser.add_argument("--wandb_artifacts", action="store_true", help="W&B: keep the models and embeddings as well")
    args, settings = parser.parse_known_args(argv)
    if settings and not args.checkpoint:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    args.settings = settings
    for option in ("superclasses", "robustness", "few_shot", "retrieval", "renaming", "force", "wandb_artifacts"):
        if args.redraw and getattr(args, option):
            raise UserError(f"--{option} needs --runs; --redraw draws what the rows hold and computes none")
    if args.redraw and args.wandb != "disabled":
        raise UserError("--wandb needs --runs; --redraw only draws")
    if args.wandb_artifacts and args.wandb == "disabled":
        raise UserError("--wandb_artifacts keeps files in W&B, so it needs --wandb offline or --wandb online")
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; allowed: 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Evaluate from a command line; return the exit status."""

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
            show(rows, Path(args.out) if args.out else Path(args.redraw).parent)
        return 0

    return distributed.run(parse_and_evaluate, "interrupted; the same command resumes the embedding pass")


if __name__ == "__main__":
    sys.exit(main())
