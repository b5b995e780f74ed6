"""Files that are there whole or not at all, whatever happens while they are written.

The run directory, and the checkpoint from which a run goes on exactly.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from mrl.config import Config, to_yaml
from mrl.distributed import Process
from mrl.errors import UserError


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write ``path`` by way of a temporary name beside it, flushed to the disk before it is renamed.

    Raises:
        UserError: It cannot be written, e.g. because the disk is full; what stood there is kept.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the system's error in a RuntimeError
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path} could not be written ({cause}); what stood there before is kept") from error


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; see `atomic_write`."""
    atomic_write(path, lambda file: file.write(text.encode()))


CHECKPOINT_FORMAT = "mrl-checkpoint-1"

# Settings that may change when a run goes on: they say where and how, not what is computed.
RESUME_OVERRIDABLE = {
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
    atomic_write_text(directory / "config.yaml", config_yaml)
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
    changed = [key for key in new if key not in RESUME_OVERRIDABLE and old.get(key) != new[key]]
    if changed:
        told = ", ".join(f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in changed)
        raise UserError(f"{directory} was started with other settings ({told}); {way_out}")


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to checkpoints/last.pt; whatever happens meanwhile, a whole checkpoint stands there.

    Raises:
        UserError: It cannot be written, e.g. because the disk is full; the previous one is kept.
    """
    content = {"format": CHECKPOINT_FORMAT, **state}
    atomic_write(checkpoint_path(directory), lambda file: torch.save(content, file))


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
    atomic_write_text(path, json.dumps(starts, indent=2) + "\n")


def provenance(world_size: int = 1) -> dict[str, Any]:
    """When, with what code, on what machine: a dict for provenance.json, beside every result."""
    commit, dirty = _git_state(Path(__file__).resolve().parent.parent)
    return {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm", "numpy")},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world_size,
    }


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at ``root`` and whether files differ from it; Nones where ``root`` is not a checkout."""
    # A copy installed below some other checkout (a virtual environment) must not claim that one's commit.
    if not (root / ".git").exists():
        return None, None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit, bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
