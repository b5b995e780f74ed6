import builtins
import json

import pytest

from mrl.errors import UserError
from mrl.training.logging import Tracker


def logged(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_after_the_checkpoint_are_dropped_when_a_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    with Tracker(tmp_path, True, start_step=2, total_steps=5, batch_size=1) as tracker:
        tracker.log({"step": 3, "loss/8": 1.5}, None)
    assert logged(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss/8": 1.5}]


def test_a_row_with_a_non_finite_number_is_still_json(tmp_path):
    with Tracker(tmp_path, True, 0, 5, 1) as tracker:
        tracker.log({"step": 1, "loss/8": float("nan")}, None)
    assert logged(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/8": None}]


def test_other_processes_write_nothing(tmp_path):
    with Tracker(tmp_path, False, 0, 5, 1) as tracker:
        tracker.log({"step": 1}, "status")
        tracker.advance()
        tracker.say("hello")
        tracker.start_wandb("offline", "mrl", None, "a", {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wandb_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with Tracker(tmp_path, True, 0, 5, 1) as tracker, pytest.raises(UserError, match="pip install wandb"):
        tracker.start_wandb("offline", "mrl", None, "a", {})
