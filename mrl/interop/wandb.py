"""An evaluation in W&B: tables of every study, figures and headline numbers, in the run that training logged to.

A saved W&B workspace with the charts one wants of these runs.

    python -m mrl.interop.wandb --project mrl --dry_run             # print what would be saved; no login
    python -m mrl.interop.wandb --entity me --project mrl           # save it; needs a login

Accuracy by size, everything of training by prefix, nested training against fixed features across runs, throughput.
Charts by size read what `python eval.py --runs ... --wandb online` logs, the others what train.py logs.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrl.config import WandbConfig, read_config
from mrl.errors import UserError
from mrl.figures import figures_of
from mrl.results import METHODS, Row
from mrl.rundir import atomic_write_text

# What is drawn against size, by (study, metric); those of a plain model cut short have names of their own.
BY_DIM = {
    ("classification", "top_1"): "top_1",
    ("classification", "top_5"): "top_5",
    ("retrieval", "top_1"): "1nn_top_1",
    ("retrieval", "map@10"): "map@10",
}
TRUNCATED = "FF truncated"
FIGURE_DPI = 110


def report_evaluation(
    runs: Mapping[str, Path], rows: Sequence[Row], record: Mapping[str, Any], mode: str, artifacts: bool = False
) -> None:
    """Log the evaluation of each run to its W&B run: the one of its training (file wandb_id), or a new one.

    - ``eval/<study>``: a table of the study's rows.
    - ``eval/figures/<name>``: the figures, of all runs that were evaluated together.
    - ``eval/top_1``, ``eval/1nn_top_1``, ...: a point per size, against ``eval/dim``; ``eval/truncated_...`` of a plain
      model cut short.
    - Summary ``eval/top_1/8`` and so on: the same as headline numbers.
    - Config ``eval_method`` (MRL, MRL-E, FF) and ``eval_provenance``, beside the training's.

    Args:
        runs: ``{name in rows: run directory}``.
        rows: Of all runs.
        record: The evaluation's provenance.
        mode: "offline" (written below the run directory, to ``wandb sync`` later) or "online" (needs a login).
        artifacts: Also keep the model and the embeddings.

    Raises:
        UserError: W&B is not installed, or it cannot start.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs W&B: pip install wandb, or leave it out") from error
    pictures = {dataset: _pictures(rows, dataset) for dataset in dict.fromkeys(row.dataset for row in rows)}
    for name, directory in runs.items():
        of_run = [row for row in rows if row.run == name]
        config = read_config(directory / "config.yaml")
        run = _start(directory, name, config.wandb, mode)
        try:
            run.config.update(dataclasses.asdict(config), allow_val_change=True)
            about = {"eval_method": _method(of_run), "eval_provenance": dict(record)}
            run.config.update(about, allow_val_change=True)
            tables = {f"eval/{study}": _table(of_run, study) for study in dict.fromkeys(row.study for row in of_run)}
            datasets = dict.fromkeys(row.dataset for row in of_run)
            figures = {
                f"eval/figures/{figure}{'' if dataset == of_run[0].dataset else f' {dataset}'}": wandb.Image(picture)
                for dataset in datasets
                for figure, picture in pictures[dataset].items()
            }
            run.log(tables | figures)
            _log_by_dim(run, _by_dim([row for row in of_run if row.dataset == of_run[0].dataset]))
            if artifacts:
                _log_artifacts(run, directory, name)
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()


def _start(directory: Path, name: str, settings: WandbConfig, mode: str) -> Any:
    """The W&B run of a run directory, gone on with or begun."""
    import wandb

    id_path = directory / "wandb_id"
    if not id_path.exists():
        atomic_write_text(id_path, secrets.token_hex(4))
    try:
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=settings.project,
            entity=settings.entity,
            name=name,
            id=id_path.read_text(),
            resume="allow",
            dir=str(directory),
            job_type="eval",
        )
    except wandb.errors.Error as error:
        raise UserError(f"W&B could not start ({error}); --wandb offline needs no login") from error


def _method(rows: Sequence[Row]) -> str:
    """What the model is called, of all methods that its rows have."""
    found = {row.method for row in rows if row.study == "classification"}
    return next((method for method in METHODS if method in found), "")


def _table(rows: Sequence[Row], study: str) -> Any:
    """One study's rows as a table; columns that hold nothing are left out."""
    import wandb

    of_study: list[dict[Any, Any]] = [dataclasses.asdict(row) for row in rows if row.study == study]
    columns: list[str | int] = [column for column in of_study[0] if any(row[column] is not None for row in of_study)]
    return wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in of_study])


def _pictures(rows: Sequence[Row], dataset: str) -> dict[str, Any]:
    """``{name: PIL image}`` of every figure of one dataset."""
    from PIL import Image

    pictures = {}
    for name, figure in figures_of([row for row in rows if row.dataset == dataset]).items():
        file = io.BytesIO()
        figure.savefig(file, dpi=FIGURE_DPI)
        pictures[name] = Image.open(file)
    return pictures


def _by_dim(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """``{dim: {metric: value}}``, sizes ascending."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        metric = BY_DIM.get((row.study, row.metric))
        if metric and row.dim is not None and row.method in METHODS:
            prefix = "truncated_" if row.method == TRUNCATED else ""
            found.setdefault(row.dim, {})[f"eval/{prefix}{metric}"] = row.value
    return dict(sorted(found.items()))


def _log_by_dim(run: Any, by_dim: Mapping[int, Mapping[str, float]]) -> None:
    run.define_metric("eval/dim", hidden=True)
    for metric in dict.fromkeys(metric for of_dim in by_dim.values() for metric in of_dim):
        run.define_metric(metric, step_metric="eval/dim")
    for dim, of_dim in by_dim.items():
        run.log({"eval/dim": dim, **of_dim})
    run.summary.update({f"{metric}/{dim}": value for dim, of_dim in by_dim.items() for metric, value in of_dim.items()})


def _log_artifacts(run: Any, directory: Path, name: str) -> None:
    import wandb

    model = wandb.Artifact(f"{name}-model".replace("/", "-"), type="model")
    for file in ("model.safetensors", "model.json", "config.yaml", "provenance.json"):
        if (directory / file).is_file():
            model.add_file(str(directory / file))
    embeddings = wandb.Artifact(f"{name}-embeddings".replace("/", "-"), type="embeddings")
    embeddings.add_dir(str(directory / "embeddings"))
    for artifact in (model, embeddings):
        run.log_artifact(artifact)


INSTALL = "this needs W&B's workspaces: pip install wandb-workspaces"
DEFAULT_NAME = "Matryoshka representations"


def build_workspace(entity: str, project: str, name: str = DEFAULT_NAME) -> Any:
    """The workspace, not saved yet; nothing is asked of W&B.

    Raises:
        UserError: The package wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(INSTALL) from error

    def by_size(title: str, *metrics: str, **rest: Any) -> Any:
        axes: dict[str, Any] = {"x": "eval/dim", "log_x": True, "title_x": "embedding size (dims)"}
        return panels.LinePlot(title=title, y=list(metrics), **axes, **rest)

    def of_prefixes(title: str, start: str) -> Any:
        return panels.LinePlot(title=title, x="step", metric_regex=f"^{start}/[0-9]+$")

    def by_step(title: str, metric: str, **rest: Any) -> Any:
        return panels.LinePlot(title=title, x="step", y=[metric], **rest)

    per_method: dict[str, Any] = {
        "groupby": panels.Config("eval_method"),
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stddev",
    }
    sections = {
        "Accuracy by size": [
            by_size("linear classification, top-1", "eval/top_1"),
            by_size("1-nearest neighbor, top-1", "eval/1nn_top_1"),
            by_size("retrieval, mAP@10", "eval/map@10"),
        ],
        "MRL against FF": [
            by_size("top-1 by method, mean of runs", "eval/top_1", **per_method),
            by_size("mAP@10 by method, mean of runs", "eval/map@10", **per_method),
            by_size("nested and plainly truncated, top-1", "eval/top_1", "eval/truncated_top_1"),
        ],
        "Training, by prefix": [
            of_prefixes("validation top-1 of each prefix", "top_1"),
            of_prefixes("training loss of each prefix", "loss"),
            of_prefixes("validation loss of each prefix", "val_loss"),
        ],
        "Throughput": [
            by_step("images per second", "images_per_second"),
            by_step("share of time spent waiting for data", "data_wait", range_y=(0, 1)),
            by_step("learning rate", "lr"),
        ],
    }
    return workspaces.Workspace(
        name=name,
        entity=entity,
        project=project,
        sections=[
            workspaces.Section(name=section, panels=of_section, is_open=True)
            for section, of_section in sections.items()
        ],
    )


def spec(workspace: Any) -> dict[str, Any]:
    """What is sent to W&B when the workspace is saved."""
    return json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Create the workspace from a command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mrl.interop.wandb",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--entity", help="W&B team or user; default: your own")
    parser.add_argument("--project", default="mrl", help="W&B project, as wandb.project in training; default: mrl")
    parser.add_argument("--name", default=DEFAULT_NAME, help=f"what the workspace is called; default: {DEFAULT_NAME}")
    parser.add_argument("--dry_run", action="store_true", help="print the specification and save nothing")
    args = parser.parse_args(argv)
    try:
        if args.dry_run:
            print(json.dumps(spec(build_workspace(args.entity or "", args.project, args.name)), indent=2))
        else:
            print(f"workspace: {_save(args.entity, args.project, args.name)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _save(entity: str | None, project: str, name: str) -> str:
    """The address of the workspace, once it is saved."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(INSTALL) from error
    try:
        return build_workspace(entity or str(wandb.Api().default_entity), project, name).save().url
    except UserError:
        raise
    except Exception as error:  # of the network or of W&B, in many classes
        raise UserError(
            f"W&B did not save the workspace ({error}); it needs a login (wandb login), --dry_run does not"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
