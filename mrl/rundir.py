"""Atomic file writes, and the run directory: resume rules, the checkpoint, provenance."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from tqdm import tqdm

from mrl.distributed import out_of_memory
from mrl.errors import UserError

CHECKPOINT_FORMAT = "mrl-checkpoint-1"
SECONDS_OF_ORPHANS = 6.0  # workers of a killed run end within five seconds

# Settings that may change when a run is resumed: they say where and how, not what is computed.
RESUME_OVERRIDABLE = {
    *("run.resume", "run.dir", "run.name", "data.root", "data.num_workers"),
    *("wandb.mode", "wandb.project", "wandb.entity", "train.accumulation_steps", "train.gradient_precision"),
    *("train.compile", "train.checkpoint_minutes", "train.log_every_steps", "train.profile_steps"),
    "data.backend",  # check_data compares the one in use
}
# Values in effect for runs that are older than these settings, where they are not today's defaults.
OLD_SETTINGS = {"data.exif_rotation": "ignore", "data.interpolation": "bilinear"}


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a temporary file beside ``path``, flush it to disk, and rename it to ``path``.

    Raises:
        UserError: It cannot be written, e.g. because the disk is full; the file that was there before is kept.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps it in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        kept = "the file that was there before is kept"
        kept += "; free some disk space" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"{path} could not be written ({cause}); {kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file with `atomic_write`, names of files that are not UTF-8 included."""
    atomic_write(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def checkpoint_path(directory: Path) -> Path:
    """Return where a run directory keeps its checkpoint."""
    return directory / "checkpoints" / "last.pt"


def check_run(directory: Path, resume: str, config_yaml: str, default_yaml: str) -> None:
    """Check that a run may start or resume in ``directory``; one without any checkpoint is replaced."""
    resuming, trained = checkpoint_path(directory).exists(), (directory / "model.safetensors").exists()
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, so it cannot be the run directory; choose another --run.name")
    if directory.exists():
        with hold(directory):
            failed = (directory / "config.yaml").exists() and not resuming and not trained
            if resume == "never" and any(directory.iterdir()) and not failed:
                raise UserError(
                    f"{directory} already holds a run; choose another --run.name, or resume it: --run.resume auto"
                )
    if resuming:
        longer = (
            "to train longer, start another run from its weights; the head is kept if classes and sizes are the same: "
            f"--model.init {directory} --run.name {directory.name}_longer"
        )
        those = f"--config {directory / 'config.yaml'} gives those; or give another --run.name"
        check_settings(directory, config_yaml, default_yaml, those, longer if trained else "")
    elif trained:
        raise UserError(f"{directory} holds a trained model but no checkpoint to resume; choose another --run.name")


def check_settings(directory: Path, config_yaml: str, default_yaml: str, way_out: str, longer: str = "") -> None:
    """Check that the run in ``directory`` was started with the settings in ``config_yaml``, overridable ones aside.

    Settings that are newer than the run count as today's defaults, or as `OLD_SETTINGS`. ``way_out`` ends the error,
    or ``longer`` does if train.epochs differs.
    """

    def flat(yaml_text: str) -> dict[str, Any]:
        sections = yaml.safe_load(yaml_text)
        return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}

    path = directory / "config.yaml"
    if not path.exists():
        raise UserError(f"{directory} has a checkpoint but no config.yaml, so its settings are unknown")
    old, new = flat(default_yaml) | OLD_SETTINGS | flat(path.read_text()), flat(config_yaml)
    changed = [key for key in new if key not in RESUME_OVERRIDABLE and old.get(key) != new[key]]
    if changed:
        changes = ", ".join(f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in changed)
        way_out = longer if longer and "train.epochs" in changed else way_out
        raise UserError(f"{directory} was started with other settings ({changes}); {way_out}")


def open_run(directory: Path, config_yaml: str) -> None:
    """Prepare the run directory; called just before the first step, so that a run that cannot start leaves none."""
    checkpoint_path(directory).parent.mkdir(parents=True, exist_ok=True)
    with hold(directory):  # another process may have begun meanwhile
        atomic_write_text(directory / "config.yaml", config_yaml)
        if not checkpoint_path(directory).exists():  # drop the files of a run that ended before its first
            (directory / "metrics.jsonl").write_text("")
            for name in ("wandb_id", "unreadable.txt", "held_out.json"):
                (directory / name).unlink(missing_ok=True)


def read_held_out(run: Path) -> list[str] | None:
    """Return the training images that a run was validated on, relative to data.root; None if it had a val/ folder."""
    path = run / "held_out.json"
    return json.loads(path.read_text()) if path.is_file() else None


@contextlib.contextmanager
def hold(path: Path, notice: str = "") -> Iterator[int]:
    """Keep other processes from working in ``path``, whose file descriptor this gives; the lock ends with this process.

    With a ``notice``, print it if another process has the lock, and wait for as long as that takes.
    """
    folder, deadline = os.open(path, os.O_RDONLY), time.monotonic() + SECONDS_OF_ORPHANS
    try:
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if notice and deadline < math.inf:
                    tqdm.write(notice)
                    deadline = math.inf
                if time.monotonic() > deadline:
                    way_out = "wait for its end, or choose another --run.name"
                    raise UserError(f"another process is training in {path}; {way_out}") from error
                time.sleep(0.2)
            except OSError:  # a disk without locks
                break
        yield folder
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)  # worker processes may still have the folder open
        os.close(folder)


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to checkpoints/last.pt with `atomic_write`."""
    atomic_write(checkpoint_path(directory), lambda file: torch.save({"format": CHECKPOINT_FORMAT, **state}, file))


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """Return the state that `save_checkpoint` wrote, on the CPU; None if there is none yet."""
    path = checkpoint_path(directory)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {state['format']!r}, not {CHECKPOINT_FORMAT!r}")
        return state
    except Exception as error:
        if isinstance(error, OSError) or out_of_memory(error):
            raise
        problem = f"is truncated or not a checkpoint of this version ({repr(error).splitlines()[0]})"
        way_out = "restore it from a copy, or delete the run directory to start again"
        raise UserError(f"{path} {problem}; {way_out}") from error


def check_data(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a resumed run has as many images of both splits, the same classes, and the same backend as before."""
    before = now | before
    if before != now:
        said = "{num_images:,} images of {0} classes (and {num_val:,} for validation), read by the {backend} backend"
        old, new = (said.format(len(data["classes"]), **data) for data in (before, now))
        other = " (other classes)" if before["classes"] != now["classes"] else ""
        raise UserError(
            f"{directory} was trained on {old}; now there are {new}{other}. Give the same data, and "
            f"--data.backend {before['backend']}: other backends decode to other pixels"
        )


def read_metrics(directory: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the rows of a log in a run directory, without the half line that a killed process may leave at its end."""
    path = directory / file
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_validation(directory: Path) -> dict[int, float]:
    """Return ``{dim: top-1}`` of the last validation in metrics.jsonl; {} if there is none."""
    found = [
        {int(key.removeprefix("top_1/")): value for key, value in row.items() if key.startswith("top_1/")}
        for row in read_metrics(directory)
    ]
    return next(filter(None, reversed(found)), {})


def record_start(directory: Path, step: int, world_size: int, micro_batch_size: int) -> None:
    """Add this start to provenance.json; a resumed run has several, perhaps on different machines."""
    path = directory / "provenance.json"
    starts = json.loads(path.read_text()) if step > 0 and path.exists() else []
    start = {"start_step": step, "command": sys.argv, "folder": os.getcwd(), "micro_batch_size": micro_batch_size}
    start |= provenance(world_size)
    atomic_write_text(path, json.dumps([*starts, start], indent=2) + "\n")


def provenance(world_size: int = 1) -> dict[str, Any]:
    """Return the time, code version and machine, to keep beside results."""
    status = _git("status", "--porcelain")
    cpuinfo = Path("/proc/cpuinfo")
    cpu_names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm", "numpy")},
        "platform": platform.platform(),
        "cpu": cpu_names[0] if cpu_names else platform.processor() or platform.machine(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world_size,
    }


def _git(*argv: str) -> str | None:
    """Return git's output for the checkout that this file is in; None if it is not in one, or has no commit yet."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # a copy installed below another checkout is not of that one's commit
        return None
    try:
        command = ["git", "-C", str(root), *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
