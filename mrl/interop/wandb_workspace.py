"""A saved W&B workspace with the charts one wants of these runs.

    python -m mrl.interop.wandb_workspace --project mrl --dry_run             # print what would be saved; no login
    python -m mrl.interop.wandb_workspace --entity me --project mrl           # save it; needs a login

Accuracy by size, everything of training by prefix, nested training against fixed features across runs, throughput.
Charts by size read what `python eval.py --runs ... --wandb online` logs, the others what train.py logs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from mrl.errors import UserError

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
            by_size("1-nearest neighbour, top-1", "eval/1nn_top_1"),
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
        prog="python -m mrl.interop.wandb_workspace",
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
