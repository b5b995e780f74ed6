import json

import pytest

from experiments import reproduce
from experiments.reproduce import main
from experiments.scheduler import Outcome
from mrl.results import read_rows

# A ViT of one block, 32 wide, on handwritten digits.
VIT = "{img_size: 16, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}"
GRID = f"""
title: Digits
train_images: 1442
set:
  model.backbone: vit_tiny_patch16_224
  model.kwargs: {VIT}
  data.train_px: 16
  data.eval_resize_px: 16
  data.eval_px: 16
  data.batch_size: 256
  train.epochs: 2
runs:
  - {{name: mrl, group: digits, recipe: digits_mrl, seeds: [0]}}
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return str(path)


def test_one_command_trains_evaluates_and_reports(grid, tmp_path, capfd):
    words = ["--grid", grid, "--runs", str(tmp_path / "runs"), "--epochs", "1"]
    assert main(words) == 0
    out = tmp_path / "runs" / "results" / "digits"
    rows = read_rows(out / "results.jsonl")
    assert {row.run for row in rows} == {"mrl_seed0"} and not any(" of class " in row.metric for row in rows)
    trained = json.loads((tmp_path / "runs" / "mrl_seed0" / "metrics.jsonl").read_text().splitlines()[-1])
    [row] = [r for r in rows if (r.study, r.metric, r.dim) == ("classification", "top_1", 8)]
    assert row.value == pytest.approx(trained["top_1/8"], abs=0.01)
    record = json.loads((out / "provenance.json").read_text())
    run = record["runs"]["mrl_seed0"]
    assert (run["recipe"], run["seed"], run["starts"]) == ("digits_mrl", 0, 1) and run["seconds"] > 0
    assert str(tmp_path) not in (out / "provenance.json").read_text()  # no paths of the machine
    assert "Digits: 1 runs, seed 0" in (out / "tables.md").read_text()
    capfd.readouterr()
    assert main([*words, "--list"]) == 0
    assert " finished " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs is 0; allowed: 1 or more"),
        (["--epochs", "0"], "--epochs is 0; allowed: 1 or more"),
        (["--only", "ff*"], "--only ff* fits no run; runs: mrl_seed0"),
    ],
)
def test_bad_words_are_refused(grid, tmp_path, capsys, words, message):
    assert main(["--grid", grid, "--runs", str(tmp_path / "runs"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (Outcome(failed={"mrl_seed0": "killed by SIGKILL"}), 1, "failed: mrl_seed0: killed by SIGKILL"),
        (Outcome(stopped_by=2), 130, "the same command goes on"),
    ],
)
def test_the_exit_status_tells_of_failures_and_stops(grid, tmp_path, capsys, monkeypatch, outcome, status, message):
    monkeypatch.setattr(reproduce.Scheduler, "train_all", lambda self: outcome)
    assert main(["--grid", grid, "--runs", str(tmp_path / "runs")]) == status
    assert message in capsys.readouterr().err
