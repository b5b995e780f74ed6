"""Evaluations in W&B, read back from the files that W&B itself writes offline."""

import contextlib
import dataclasses
import io
import json
import signal
import time
from pathlib import Path
from unittest.mock import MagicMock

import pandas as pd
import pytest
import torch
from PIL import Image

import train
from mrl.config import Config, DataConfig, RunConfig, WandbConfig, to_yaml
from mrl.figures.dashboard import dashboard
from mrl.interop.wandb import BY_DIM, CHARTS, logged_values, offline_points, offline_records, report_evaluation
from mrl.interop.wandb import main as workspace
from mrl.results import Source
from mrl.training.logging import Tracker
from tests.test_train import TINY, stop_at

wandb = pytest.importorskip("wandb")


def read_back(directory):
    """Summary, history, config, run ids, artifacts and exit codes of all offline files of a run directory."""
    paths = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 20
    # W&B's own process may be behind: a file is complete once it holds the exit.
    while time.monotonic() < deadline and not all(any(r.HasField("exit") for r in offline_records(p)) for p in paths):
        time.sleep(0.1)
    found = {"summary": {}, "history": [], "config": {}, "ids": [], "artifacts": [], "exit": []}
    for record in (record for path in paths for record in offline_records(path)):
        match record.WhichOneof("record_type"):
            case "run":
                found["ids"].append(record.run.run_id)
                found["config"] |= logged_values(record.run.config.update)
            case "config":
                found["config"] |= logged_values(record.config.update)
            case "history":
                found["history"].append(logged_values(record.history.item))
            case "summary":
                found["summary"] |= logged_values(record.summary.update)
            case "artifact":
                found["artifacts"].append(record.artifact)
            case "exit":
                found["exit"].append(record.exit.exit_code)
    return found


def rows_of(name, method, dims):
    source = Source("digits", name, 0, 32, 32, False)
    rows = []
    for i, dim in enumerate(dims):
        rows.append(source.row("classification", method, "top_1", 0.5 + i / 10, 40, dim=dim))
        rows.append(source.row("retrieval", method, "map@10", 0.4 + i / 10, 40, dim=dim, cost=0.5))
    return rows


@pytest.fixture
def runs(tmp_path):
    """Directories of two runs; the first has logged its training to W&B run abcd1234."""
    names = {name: tmp_path / name for name in ("mrl", "ff")}
    for name, directory in names.items():
        (directory / "embeddings" / "val").mkdir(parents=True)
        (directory / "embeddings" / "val" / "labels.npy").write_bytes(b"123")
        (directory / "model.safetensors").write_bytes(b"weights")
        run, data = RunConfig(name=name, seed=7), DataConfig(name="digits")
        config = Config(run=run, data=data, wandb=WandbConfig(project="a-project"))
        (directory / "config.yaml").write_text(to_yaml(config))
    (names["mrl"] / "wandb_id").write_text("abcd1234")
    return names


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def test_tables_figures_headlines_config_and_artifacts_are_in_the_runs_of_training(runs):
    rows = rows_of("mrl", "MRL", (8, 16)) + rows_of("ff", "FF", (16,)) + rows_of("ff", "FF truncated", (8,))
    record = {"git_commit": "0123abc"}
    report_evaluation(runs, rows, record, "offline", artifacts=True)
    mrl, ff = (read_back(runs[name]) for name in ("mrl", "ff"))
    assert mrl["ids"] == ["abcd1234"] and ff["ids"] == [(runs["ff"] / "wandb_id").read_text()]
    assert mrl["exit"] == ff["exit"] == [0]
    numbers = {name: value for name, value in mrl["summary"].items() if name.rpartition("/")[2].isdigit()}
    assert numbers == {"eval/top_1/8": 0.5, "eval/top_1/16": 0.6, "eval/map@10/8": 0.4, "eval/map@10/16": 0.5}
    assert ff["summary"]["eval/truncated_top_1/8"] == 0.5 and "eval/top_1/8" not in ff["summary"]
    by_dim = [{k: v for k, v in row.items() if k[0] != "_"} for row in mrl["history"] if "eval/dim" in row]
    assert by_dim == [
        {"eval/dim": 8, "eval/top_1": 0.5, "eval/map@10": 0.4},
        {"eval/dim": 16, "eval/top_1": 0.6, "eval/map@10": 0.5},
    ]
    assert mrl["config"]["run"]["seed"] == 7 and mrl["config"]["eval_provenance"] == record
    assert (mrl["config"]["eval_method"], ff["config"]["eval_method"]) == ("MRL", "FF")
    [logged] = [row for row in mrl["history"] if "eval/classification/path" in row]
    [folder] = (runs["mrl"] / "wandb").glob("offline-run-*")
    table = json.loads((folder / "files" / logged["eval/classification/path"]).read_text())
    as_dicts = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    # A table holds all of a row but the fields that are None.
    kept = [row for row in rows if (row.run, row.study) == ("mrl", "classification")]
    assert as_dicts == [{k: v for k, v in dataclasses.asdict(row).items() if v is not None} for row in kept]
    picture = folder / "files" / logged["eval/figures/accuracy_by_dim/path"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert {"mrl-model", "mrl-embeddings"} <= {artifact.name for artifact in mrl["artifacts"]}


def test_history_steps_go_on_over_sittings_of_training_and_evaluations(tmp_path, monkeypatch):
    """The steps are those of training; the validation at the end of an epoch joins the last row of the epoch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = [*TINY, "--wandb.mode", "offline", "--run.dir", str(tmp_path), "--run.name", "a", "--run.resume", "auto"]
    stop_at(monkeypatch, 7, signal.SIGTERM)
    assert train.main(argv) == 143 and train.main(argv) == 0
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # as a killed run leaves it
    report_evaluation({"a": tmp_path / "a"}, rows_of("a", "MRL", (8, 16)), {}, "offline")
    found = read_back(tmp_path / "a")
    history = found["history"]
    assert [row["_step"] for row in history] == [2, 4, 5, 6, 8, 10, 11, 12, 13]
    assert [row["step"] for row in history[:6]] == [2, 4, 5, 6, 8, 10]
    assert all(("top_1/8" in row) == (row["_step"] in (5, 10)) for row in history[:6])
    assert len(found["ids"]) == 3 and set(found["ids"]) == {(tmp_path / "a" / "wandb_id").read_text()}
    assert {"lr", "images_per_second", "data_wait", "top_1/32"} <= set().union(*history)
    assert not [artifact for artifact in found["artifacts"] if artifact.type in ("model", "embeddings")]
    points = offline_points([tmp_path / "a"])
    steps = points[points.metric == "loss/8"]
    assert list(steps.x) == [row["step"] for row in history[:6] if "loss/8" in row]
    assert list(steps.value) == [row["loss/8"] for row in history[:6] if "loss/8" in row]
    by_dim = points[points.metric == "eval/top_1"]
    assert list(by_dim.x) == [8, 16] and set(by_dim.method) == {"MRL"}
    [panels, *_] = [part.axes for part in dashboard(points, CHARTS).subfigs]
    assert [axes.get_title() for axes in panels] == list(CHARTS["Accuracy by dim"])
    [line] = panels[0].lines
    assert list(line.get_xdata()) == [8, 16] and list(line.get_ydata()) == list(by_dim.value)
    assert workspace(["--runs", str(tmp_path / "a"), "--picture", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").size[0] == 1100


def test_a_validation_after_resuming_is_logged_at_the_next_step_of_wandb(tmp_path):
    """The training row of that step was logged before, and W&B drops rows of steps that it has passed."""
    with Tracker(tmp_path, True, 10, 20, 4) as tracker:
        tracker.wandb_run = MagicMock(step=11)
        for step in (10, 12):
            tracker.log({"step": step, "top_1/8": 0.5})
        assert [call.kwargs["step"] for call in tracker.wandb_run.log.call_args_list] == [11, 12]


def test_a_second_evaluation_logs_its_tables_after_the_first(runs, monkeypatch):
    """W&B drops what comes at a step before its last."""
    run = MagicMock(step=50)
    monkeypatch.setattr("mrl.interop.wandb.start_wandb", lambda *_, **__: contextlib.nullcontext(run))
    report_evaluation({"mrl": runs["mrl"]}, rows_of("mrl", "MRL", (8, 16)), {}, "offline")
    tables = run.log.call_args_list[0]
    assert "eval/classification" in tables.args[0] and tables.kwargs["step"] == 50


def test_charts_of_what_was_not_logged_stay_empty():
    """Of a run without a validation or evaluation, and of one that ended before its first row."""
    points = pd.DataFrame({"run": "a", "method": "a", "x": [2, 4], "metric": "loss/8", "value": [2.0, 1.0]})
    for some, titles in ((points, {"training loss of each prefix"}), (points[:0], set())):
        figure = dashboard(some, CHARTS)
        assert {axes.get_title() for part in figure.subfigs for axes in part.axes if axes.lines} == titles
        figure.savefig(io.BytesIO())


def test_the_workspace_charts_what_training_and_evaluation_log_and_needs_no_login(capsys):
    pytest.importorskip("wandb_workspaces")
    assert workspace(["--entity", "someone", "--project", "a-project", "--dry_run"]) == 0
    sections = json.loads(capsys.readouterr().out)["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(CHARTS)
    charts = {panel["config"]["chartTitle"]: panel["config"] for s in sections for panel in s["panels"]}
    by_dim = charts["linear classification, top-1"]
    assert (by_dim["xAxis"], by_dim["metrics"], by_dim["xLogScale"]) == ("eval/dim", ["eval/top_1"], True)
    assert charts["training loss of each prefix"]["metricRegex"] == "^loss/[0-9]+$"
    assert charts["top-1 by method, mean of runs"]["groupBy"] == "eval_method.value"
    assert charts["images per second"]["metrics"] == ["images_per_second"]
    charted = {metric for chart in charts.values() for metric in chart.get("metrics", [])}
    logged = "".join((Path(__file__).parents[2] / file).read_text() for file in ("train.py", "mrl/training/logging.py"))
    for metric in charted - {f"eval/{name}" for name in BY_DIM.values()} - {"eval/truncated_top_1"}:
        assert f'"{metric}"' in logged, metric


def test_a_picture_of_runs_without_offline_files_is_refused_in_one_sentence(tmp_path, capsys):
    assert workspace(["--runs", str(tmp_path), "--picture", str(tmp_path / "x.png")]) == 2
    assert "--wandb.mode offline" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_the_end_of_a_killed_run_is_left_out(runs):
    report_evaluation({"mrl": runs["mrl"]}, rows_of("mrl", "MRL", (8,)), {}, "offline")
    read_back(runs["mrl"])  # waits until the file is complete
    [path, *_] = runs["mrl"].glob("wandb/offline-run-*/run-*.wandb")
    whole = list(offline_records(path))
    path.write_bytes(path.read_bytes()[:-3])
    assert list(offline_records(path)) == whole[:-1]


def test_saving_without_a_login_is_one_sentence(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    assert workspace(["--entity", "someone"]) == 2
    assert "wandb login" in capsys.readouterr().err
