"""Evaluate trained runs: embeddings once, then every study as rows, tables and figures.

    python eval.py --runs runs/digits_mrl runs/digits_ff           # rows and figures in runs/eval
    python eval.py --runs runs/resnet50_mrl --out results/resnet50 --batch_size 512
    torchrun --nproc_per_node=8 eval.py --runs runs/resnet50_mrl   # the embedding pass on all GPUs
    python eval.py --redraw runs/eval/results.jsonl                # figures again, from the rows alone

Embeddings of the train and val images stay in each run directory and are used again as long as the
model is the same. Stop it with Ctrl-C: the same command goes on where the embedding pass stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mrl.config import Config
from mrl.data import build_data
from mrl.errors import UserError
from mrl.figures import figures_of, save
from mrl.files import write_text
from mrl.interop.wandb_report import report_evaluation
from mrl.models import load
from mrl.recipes import read_config
from mrl.results import Row, Source, provenance, read_rows, text_table, write_rows
from mrl.retrieval.embeddings import (
    EmbeddingMetadata,
    EmbeddingSet,
    classes_sha256,
    embed_split,
    embeddings_path,
    file_sha256,
    open_embeddings,
)
from mrl.studies.hierarchy import read_superclasses
from mrl.studies.run import EmbeddedRun, run_studies
from mrl.training import distributed
from mrl.training.distributed import Process

SPLITS = ("train", "val")
SHOWN = {("classification", "top_1"), ("classification", "top_5"), ("retrieval", "top_1"), ("retrieval", "map@10")}


def evaluate(args: argparse.Namespace, process: Process) -> None:
    """Embed on all processes, then study, write and draw on the main one."""
    first = Path(args.runs[0])
    beside = first.parent if first.name not in ("", "..") else first.resolve().parent
    out = Path(args.out) if args.out else beside / "eval"
    names = name_runs([Path(run) for run in args.runs if Path(run).resolve() != out.resolve()])
    embedded = embed_runs(names, args.batch_size, args.force, process)
    if not process.is_main:
        return
    table = read_superclasses(args.superclasses) if args.superclasses else None
    rows = [row for run in embedded for row in run_studies(run, process.device, table)]
    out.mkdir(parents=True, exist_ok=True)
    write_rows(rows, out / "results.jsonl")
    record = {"command": sys.argv, "runs": {name: str(run) for name, run in names.items()}}
    record |= provenance(process.world_size)
    write_text(out / "provenance.json", json.dumps(record, indent=2) + "\n")
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


def embed_runs(names: dict[str, Path], batch_size: int, force: bool, process: Process) -> list[EmbeddedRun]:
    """Every run with the embeddings of its train and val images, computed where they are not on disk yet.

    Raises:
        UserError: A run cannot be read, its images do not fit it, or an embedding is not finite.
    """
    embedded: list[EmbeddedRun] = []
    classes_of: dict[str, tuple[str, ...]] = {}
    images: dict[str, Any] = {}
    images_are_of: tuple = ()
    for name, run in names.items():
        config, model = read_config(run / "config.yaml"), load(run)
        data, classes, dataset = config.data, model.info.classes, dataset_name(config)  # type: ignore[union-attr]
        if classes_of.setdefault(dataset, classes) != classes:
            raise UserError(f"run {name} and one before it call their data {dataset!r}, but their classes differ")
        source = Source(dataset, name, config.run.seed, data.eval_resize_px, data.eval_px, flip=False)
        wanted = describe_embeddings(run, source, classes, with_flip=data.flip)
        sets: dict[str, EmbeddingSet] = {}
        for name_of_set, metadata in wanted.items():
            ready = None if force else open_embeddings(run / "embeddings" / name_of_set, metadata)
            if ready is not None:
                sets[name_of_set] = ready
        missing = [name_of_set for name_of_set in wanted if name_of_set not in sets]
        splits = tuple(dict.fromkeys(wanted[name_of_set].split for name_of_set in missing))
        if missing:
            key = (data.name, data.root, data.backend, data.eval_resize_px, data.eval_px, data.mean, data.std)
            if key != images_are_of or not set(splits) <= images.keys():
                images = {}  # lets go of the last run's before the next are read
                images = build_data(data, config.run.seed, process.device, process.is_main, splits=splits)
                images_are_of = key
            model.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name_of_set in missing:
            of_split = images[wanted[name_of_set].split]
            refuse_other_classes(name, classes, of_split.classes)
            directory = run / "embeddings" / name_of_set
            if force and process.is_main:
                shutil.rmtree(directory, ignore_errors=True)
            sets[name_of_set] = embed_split(
                directory, wanted[name_of_set], of_split, model.embed, model.width, process, batch_size
            )
        embedded.append(
            EmbeddedRun(source, model.head.cpu(), classes, sets["train"], sets["val"], sets.get("val_flip"))
        )
    return embedded


def dataset_name(config: Config) -> str:
    """What the data of a run are called: data.name, or the folder's own name where that is "folder"."""
    data = config.data
    return Path(data.root).resolve().name if data.name == "folder" and data.root else data.name


def describe_embeddings(
    run: Path, source: Source, classes: Sequence[str], with_flip: bool
) -> dict[str, EmbeddingMetadata]:
    """``{name: metadata}`` of the embeddings that a run's model gives; of mirrored images too if it has seen such."""
    checkpoint_sha256 = file_sha256(run / "model.safetensors")
    views = [(split, False) for split in SPLITS] + ([("val", True)] if with_flip else [])
    return {
        embeddings_path(run, split, flip).name: EmbeddingMetadata(
            checkpoint_sha256=checkpoint_sha256,
            dataset=source.dataset,
            split=split,
            resize_px=source.resize_px,
            crop_px=source.crop_px,
            flip=flip,
            classes_sha256=classes_sha256(classes),
        )
        for split, flip in views
    }


def refuse_other_classes(name: str, trained: Sequence[str], found: Sequence[str]) -> None:
    """Nothing, if the images have the classes that the run was trained on, in the same order."""
    if list(trained) != list(found):
        raise UserError(
            f"run {name} was trained on {len(trained)} classes ({', '.join(trained[:3])}, ...), but its data now has "
            f"{len(found)} ({', '.join(found[:3])}, ...); restore the data that it was trained on"
        )


def show(rows: Sequence[Row], out: Path) -> None:
    """Print the tables, draw the figures into ``out``, and name every file there."""
    print(text_table([row for row in rows if (row.study, row.metric) in SHOWN]), end="\n\n")
    for dataset in dict.fromkeys(row.dataset for row in rows):
        for name, figure in figures_of([row for row in rows if row.dataset == dataset]).items():
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
    parser.add_argument("--out", metavar="DIR", help="where results go; default: eval/ beside the first run")
    parser.add_argument("--superclasses", metavar="TSV", help="a table with the columns class and superclass")
    parser.add_argument("--batch_size", type=int, default=256, help="images at a time on each process; default: 256")
    parser.add_argument("--force", action="store_true", help="embed anew, e.g. because image files were replaced")
    modes = ("disabled", "offline", "online")
    parser.add_argument("--wandb", choices=modes, default="disabled", help="log it all to each run's W&B run too")
    parser.add_argument("--wandb_artifacts", action="store_true", help="W&B: keep the models and embeddings as well")
    args = parser.parse_args(argv)
    if args.wandb_artifacts and args.wandb == "disabled":
        raise UserError("--wandb_artifacts keeps files in W&B, so it needs --wandb offline or --wandb online")
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; allowed: 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Evaluate from a command line; returns the exit status."""
    try:
        args = parse(argv)
        process = distributed.start()
        if args.runs:
            evaluate(args, process)
        elif process.is_main:
            rows = read_rows(args.redraw)
            if not rows:
                raise UserError(f"{args.redraw} holds no rows, so there is nothing to draw")
            show(rows, Path(args.out) if args.out else Path(args.redraw).parent)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where the embedding pass stopped", file=sys.stderr)
        return 130
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
