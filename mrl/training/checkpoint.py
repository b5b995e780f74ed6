"""The run directory, and the checkpoint from which a run goes on exactly."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from mrl.config import Config
from mrl.errors import UserError
from mrl.files import write_text, write_whole
from mrl.recipes import to_yaml
from mrl.results import provenance
from mrl.training.distributed import Process

CHECKPOINT_FORMAT = "mrl-checkpoint-1"

# Settings that may change when a run goes on: they say where and how, not what is computed.
FREE_KEYS = {
    "run.resume",
    "run.dir",
    "data.root",
    "data.backend",  # what it comes to is compared instead, because auto depends on the files
    "data.num_workers",
    "train.accumulation_steps",
    "train.gradient_precision",
    "train.compile",
    "train.checkpoint_minutes",
    "train.log_every_steps",
    "train.profile_steps",
    "wandb.mode",
    "wandb.project",
    "wandb.entity",
}


def checkpoint_path(directory: Path) -> Path:
    """Where a run directory keeps its checkpoint."""
    return directory / "checkpoints" / "last.pt"


def check_run(directory: Path, resume: str, config_yaml: str) -> None:
    """Nothing, if a run may start or go on in the directory; nothing is written.

    Raises:
        UserError: The directory exists and ``resume`` is "never", or it holds a run with other settings.
    """
    going_on = checkpoint_path(directory).exists()
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, so it cannot be the run directory; choose another --run.name")
    if resume == "never" and directory.exists() and any(directory.iterdir()):
        raise UserError(
            f"{directory} already holds a run; choose another --run.name, or go on with it: --run.resume auto"
        )
    if going_on or (directory / "config.yaml").exists():
        refuse_other_settings(directory, config_yaml)
    if not going_on and (directory / "model.safetensors").exists():
        raise UserError(f"{directory} holds a trained model but no checkpoint to go on from; choose another --run.name")


def open_run(directory: Path, resume: str, config_yaml: str) -> None:
    """Make the run directory ready, unless `check_run` refuses; called on the main process, just before the first step.

    So what is wrong with the data or the model is said before anything is written.
    """
    check_run(directory, resume, config_yaml)
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_text(directory / "config.yaml", config_yaml)
    if not checkpoint_path(directory).exists():  # what a run that died before its first checkpoint has left
        (directory / "metrics.jsonl").write_text("")


def _flat(config_yaml: str) -> dict[str, Any]:
    sections = yaml.safe_load(config_yaml)
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def refuse_other_settings(
    directory: Path, config_yaml: str, way_out: str = "give those, or another --run.name"
) -> None:
    """Nothing, if the run in ``directory`` was started with the settings of ``config_yaml``, free ones aside.

    Raises:
        UserError: It was started with others, or its config.yaml is gone.
    """
    path = directory / "config.yaml"
    if not path.exists():
        raise UserError(f"{directory} has a checkpoint but no config.yaml, so what it trained is unknown")
    # A setting that is younger than the run had its default, which is what the run did without it.
    old, new = _flat(to_yaml(Config())) | _flat(path.read_text()), _flat(config_yaml)
    changed = [key for key in new if key not in FREE_KEYS and old.get(key) != new[key]]
    if changed:
        told = ", ".join(f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in changed)
        raise UserError(f"{directory} was started with other settings ({told}); {way_out}")


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to checkpoints/last.pt; whatever happens meanwhile, a whole checkpoint stands there.

    Raises:
        UserError: It cannot be written, e.g. because the disk is full; the previous one is kept.
    """
    content = {"format": CHECKPOINT_FORMAT, **state}
    write_whole(checkpoint_path(directory), lambda file: torch.save(content, file))


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, on the CPU; None when it has not written yet.

    Raises:
        UserError: The file is cut short, or is not a checkpoint of this package.
    """
    path = checkpoint_path(directory)
    if not path.exists():
        return None
    way_out = "restore it from a copy, or delete the run directory to start again"
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut short or not a checkpoint; {way_out}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); {way_out}") from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(
            f"{path} is not a checkpoint of this version (format {found!r}, not {CHECKPOINT_FORMAT!r}); {way_out}"
        )
    return state


def refuse_other_data(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Nothing, if a run goes on with as many images, the same classes and by the same backend as it began with."""
    used = before.get("backend", now["backend"])
    if used != now["backend"]:
        raise UserError(
            f"{directory} has read its images by the {used} backend, whose pixels differ from those of "
            f"{now['backend']}; go on with --data.backend {used}"
        )
    if (before["num_images"], before["classes"]) != (now["num_images"], now["classes"]):
        others = " others" if before["classes"] != now["classes"] else ""
        raise UserError(
            f"{directory} was trained on {before['num_images']:,} images of {len(before['classes'])} classes; "
            f"the data now has {now['num_images']:,} of {len(now['classes'])}{others}"
        )


def record_start(
    directory: Path, process: Process, micro_batch_size: int, step: int, say: Callable[[str], None]
) -> None:
    """Add this start to provenance.json: a run that was resumed has several, perhaps on other machines."""
    path = directory / "provenance.json"
    starts = json.loads(path.read_text()) if step > 0 and path.exists() else []
    now = {"world_size": process.world_size, "micro_batch_size": micro_batch_size}
    starts.append({"start_step": step, "command": sys.argv, **provenance(process.world_size), **now})
    before = {key: starts[-2][key] for key in now} if len(starts) > 1 else now
    if before != now:
        told = (
            f"resumed on {process.world_size} processes ({before['world_size']} before): same batches and learning rate"
        )
        if before["micro_batch_size"] != micro_batch_size:
            told += f", but BatchNorm sees {micro_batch_size} images at a time ({before['micro_batch_size']} before)"
        say(told)
    write_text(path, json.dumps(starts, indent=2) + "\n")
