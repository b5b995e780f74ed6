"""An evaluation in the W&B runs of the training, and a saved W&B workspace with charts of such runs.

    python -m mrl.interop.wandb --project mrl --dry_run             # print the workspace; no login
    python -m mrl.interop.wandb --entity me --project mrl           # save it; needs a login
    python -m mrl.interop.wandb --runs runs/a runs/b --picture x.png   # draw its charts from offline files; no login

Accuracy by dim and MRL against FF need `python eval.py --runs ... --wandb online`; train.py logs the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from mrl import distributed
from mrl.config import read_config
from mrl.errors import UserError
from mrl.figures import figures_of
from mrl.figures.dashboard import dashboard
from mrl.figures.style import is_model
from mrl.results import Row
from mrl.rundir import read_metrics
from mrl.training.logging import start_wandb

# Metrics that are logged against dim, by (study, metric).
BY_DIM = {
    ("classification", "top_1"): "top_1",
    ("classification", "top_5"): "top_5",
    ("retrieval", "top_1"): "1nn_top_1",
    ("retrieval", "map@10"): "map@10",
}
# The workspace: {section: {title: metrics}}. "eval/..." is charted against dim, the others against the training step;
# "loss/" is a line for every prefix.
CHARTS = {
    "Accuracy by dim": {
        "linear classification, top-1": ["eval/top_1"],
        "1-nearest neighbor, top-1": ["eval/1nn_top_1"],
        "retrieval, mAP@10": ["eval/map@10"],
    },
    "MRL against FF": {
        "top-1 by method, mean of runs": ["eval/top_1"],
        "mAP@10 by method, mean of runs": ["eval/map@10"],
        "MRL and truncated FF, top-1": ["eval/top_1", "eval/truncated_top_1"],
    },
    "Training, by prefix": {
        "validation top-1 of each prefix": ["top_1/"],
        "training loss of each prefix": ["loss/"],
        "validation loss of each prefix": ["val_loss/"],
    },
    "Throughput": {
        "images per second": ["images_per_second"],
        "share of time spent waiting for data": ["data_wait"],
        "learning rate": ["lr"],
    },
}
_BLOCK, _HEADER = 32768, 7  # bytes, of a LevelDB log


def report_evaluation(
    runs: Mapping[str, Path], rows: Sequence[Row], record: Mapping[str, Any], mode: str, artifacts: bool = False
) -> None:
    """Log the evaluation of each run to the W&B run of its training (file wandb_id), or to a new one.

    - ``eval/<study>``: a table of the study's rows. ``eval/figures/<name>``: the figures, of all runs together.
    - ``eval/top_1``, ``eval/1nn_top_1``, ... (``eval/truncated_top_1``, ... of "FF truncated"): a point per dim,
      against ``eval/dim``, and in the summary as ``eval/top_1/8`` and so on.
    - Config ``eval_method`` (MRL, MRL-E, FF) and ``eval_provenance``, the ``record``, beside the training's.

    ``runs`` is ``{name in rows: run directory}``, and ``mode`` "offline" (written below the run directory, to ``wandb
    sync`` later) or "online" (needs a login). ``artifacts`` uploads the model and the embeddings too.
    """
    figures = {dataset: _draw(rows, dataset) for dataset in {row.dataset for row in rows}}
    for name, directory in runs.items():
        config = read_config(directory / "config.yaml")
        of_run = [row for row in rows if row.run == name]
        methods = {row.method for row in of_run if row.study == "classification"}
        method = min(filter(is_model, methods), default="")
        about = {"eval_method": method, "eval_provenance": dict(record)} | dataclasses.asdict(config)
        own_dataset = of_run[0].dataset
        settings = dataclasses.asdict(config.wandb) | {"name": name, "mode": mode, "job_type": "eval"}
        with start_wandb(directory, "--wandb", **settings) as run:
            import wandb  # here, because start_wandb tells what to install

            run.config.update(about, allow_val_change=True)
            content = {f"eval/{study}": _table(of_run, study) for study in dict.fromkeys(row.study for row in of_run)}
            for dataset in dict.fromkeys(row.dataset for row in of_run):
                for figure, picture in figures[dataset].items():
                    suffix = "" if dataset == own_dataset else f" {dataset}"
                    content[f"eval/figures/{figure}{suffix}"] = wandb.Image(picture)
            trained = read_metrics(directory)  # the history of the W&B run goes on in an evaluation
            run.log(content, step=max(run.step, trained[-1]["step"] + 1 if trained else 0), commit=True)
            _log_by_dim(run, [row for row in of_run if row.dataset == own_dataset])
            if artifacts:
                _log_artifacts(run, directory, re.sub(r"[^a-zA-Z0-9_.-]+", "-", name))


def _draw(rows: Sequence[Row], dataset: str) -> dict[str, Any]:
    """Return the figures of one dataset as PIL images; wandb.Image takes figures of pyplot only."""
    pictures: dict[str, Any] = {}
    for name, figure in figures_of([row for row in rows if row.dataset == dataset]).items():
        figure.savefig(file := io.BytesIO(), dpi=110)
        pictures[name] = Image.open(file)
    return pictures


def _table(rows: Sequence[Row], study: str) -> Any:
    """Return one study's rows as a table, without columns that are None throughout."""
    import wandb

    values = [dataclasses.asdict(row) for row in rows if row.study == study]
    columns = [key for key in values[0] if any(row[key] is not None for row in values)]
    return wandb.Table(columns=list(columns), data=[[row[column] for column in columns] for row in values])


def _log_by_dim(run: Any, rows: Sequence[Row]) -> None:
    by_dim: dict[int, dict[str, float]] = {}
    for row in rows:
        metric = BY_DIM.get((row.study, row.metric))
        if metric and row.dim is not None and is_model(row.method):
            truncated = "truncated_" if row.method == "FF truncated" else ""
            by_dim.setdefault(row.dim, {})[f"eval/{truncated}{metric}"] = row.value
    run.define_metric("eval/dim", hidden=True)
    for metric in {metric for values in by_dim.values() for metric in values}:
        run.define_metric(metric, step_metric="eval/dim")
    for dim, values in sorted(by_dim.items()):
        run.log({"eval/dim": dim, **values})
        run.summary.update({f"{metric}/{dim}": value for metric, value in values.items()})


def _log_artifacts(run: Any, directory: Path, name: str) -> None:
    import wandb

    model = wandb.Artifact(f"{name}-model", type="model")
    for file in ("model.safetensors", "model.json", "config.yaml", "provenance.json"):
        if (directory / file).is_file():
            model.add_file(str(directory / file))
    embeddings = wandb.Artifact(f"{name}-embeddings", type="embeddings")
    embeddings.add_dir(str(directory / "embeddings"))
    run.log_artifact(model)
    run.log_artifact(embeddings)


def offline_records(path: Path) -> Iterator[Any]:
    """Yield W&B's records in one offline file: a LevelDB log, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content, place, parts = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(content):
        if (left := _BLOCK - place % _BLOCK) < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
        place += _HEADER + length
        if place > len(content):  # of a killed run
            return
        parts += content[place - length : place]
        if kind in (1, 4):  # whole, or the last of several
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def logged_values(items: Any) -> dict[str, Any]:
    """Return ``{key: value}`` of the history or the configuration in a record."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def offline_points(runs: Sequence[Path]) -> pd.DataFrame:
    """Return what is logged in the offline files of run directories, as `mrl.figures.dashboard.dashboard` takes it.

    Raises:
        UserError: A run directory has no offline files.
    """
    points: list[dict[str, Any]] = []
    for directory in runs:
        paths = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
        if not paths:
            raise UserError(f"{directory} has no offline W&B files; train with --wandb.mode offline")
        records, method = [record for path in paths for record in offline_records(path)], directory.name
        for record in records:
            method = logged_values(record.config.update).get("eval_method", method)
        for row in (logged_values(record.history.item) for record in records if record.HasField("history")):
            x = row.get("eval/dim", row.get("step"))
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)} if x else {}
            about = {"run": directory.name, "method": method, "x": x}
            points += [about | {"metric": key, "value": value} for key, value in numbers.items()]
    return pd.DataFrame(points, columns=["run", "method", "x", "metric", "value"])


def build_workspace(entity: str, project: str, name: str) -> Any:
    """Return the workspace, not saved yet."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    def chart(title: str, metrics: list[str]) -> Any:
        settings: dict[str, Any] = {"x": "step", "y": metrics}
        if metrics[0].endswith("/"):
            settings = {"x": "step", "metric_regex": f"^{metrics[0]}[0-9]+$"}
        elif metrics[0].startswith("eval/"):
            settings |= {"x": "eval/dim", "log_x": True, "title_x": "dim"}
        if "by method" in title:
            settings |= {"groupby": panels.Config("eval_method"), "groupby_aggfunc": "mean"}
            settings["groupby_rangefunc"] = "stddev"
        return panels.LinePlot(title=title, **settings)

    sections = [
        workspaces.Section(name=section, panels=[chart(*each) for each in charts.items()], is_open=True)
        for section, charts in CHARTS.items()
    ]
    return workspaces.Workspace(name=name, entity=entity, project=project, sections=sections)


def draw(runs: Sequence[Path], picture: Path) -> None:
    """Draw the charts of the offline files of run directories into a PNG file."""
    dashboard(offline_points(runs), CHARTS).savefig(file := io.BytesIO(), dpi=100)
    Image.open(file).convert("RGB").quantize(128).save(picture, format="PNG", optimize=True)


def save_workspace(args: argparse.Namespace) -> None:
    """Save the workspace and print its address, or only print its specification."""
    try:
        import wandb

        entity = args.entity or ("" if args.dry_run else str(wandb.Api().default_entity))
        workspace = build_workspace(entity, args.project, args.name)
        if args.dry_run:
            spec = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
            print(json.dumps(json.loads(spec), indent=2))
        else:
            print(f"workspace: {workspace.save().url}")
    except Exception as error:  # of the network or of W&B, in many classes
        cause = "pip install wandb-workspaces" if isinstance(error, ImportError) else "log in with 'wandb login' first"
        raise UserError(f"W&B did not save the workspace ({error}); {cause}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Save the workspace from a command line; returns the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m mrl.interop.wandb", description=__doc__, formatter_class=form)
    parser.add_argument("--entity", help="W&B team or user; default: your own")
    parser.add_argument("--project", default="mrl", help="W&B project, as wandb.project in training; default: mrl")
    parser.add_argument("--name", default="Matryoshka representations", help="name of the workspace")
    parser.add_argument("--dry_run", action="store_true", help="print the specification and save nothing")
    parser.add_argument("--runs", type=Path, nargs="+", help="run directories with offline files, for --picture")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the charts of --runs into this file instead")
    args = parser.parse_args(argv)
    if (args.runs is None) != (args.picture is None):
        parser.error("--runs and --picture go together")
    return distributed.run(lambda: draw(args.runs, args.picture) if args.picture else save_workspace(args), "stopped")


if __name__ == "__main__":
    sys.exit(main())
