"""Grid files, the runs in them, and their training; most of it with a stand-in for train.py that keeps its contract."""

import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import reproduce
from experiments.learning_rates import draw
from experiments.reproduce import list_runs, main, make_subset, plan, read_grid, slot_environments, train_all
from mrl.config import parse_command_line, to_yaml
from mrl.errors import UserError
from mrl.matryoshka import default_nesting_list
from mrl.results import read_rows
from tests.experiments.test_grid_c import best_rates

GRID = """
title: Digits
minutes_per_epoch: 2
set: {train.epochs: 2, optim.warmup_epochs: 1}
runs:
  - {name: mrl, group: main, recipe: digits_mrl, seeds: [0, 1]}
  - {name: ff, group: main, recipe: digits_ff, seeds: [0, 1], dims: [8, 512]}
  - {name: tuned, group: other, recipe: digits_mrl, seeds: [0], init_from: ff512_seed0}
references: {other: [mrl_seed0]}
"""
STAND_IN = """
import json, os, pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
settings = dict(zip(sys.argv[1::2], sys.argv[2::2]))
directory = pathlib.Path(settings["--run.dir"]) / settings["--run.name"]
behavior = (directory / "behavior").read_text()
metrics = directory / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
with (directory / "starts").open("a") as file:
    file.write(f"{done} ")
(directory / "began").write_text(str(time.monotonic()))
if behavior == "fails":
    sys.exit("out of memory")
for epoch in range(done + 1, 3):
    with metrics.open("a") as file:
        file.write(json.dumps({"epoch": epoch, "top_1/8": 0.25, "top_1/64": 0.5}) + "\\n")
    (directory / "pid").write_text(str(os.getpid()))
    while behavior == "waits" and not stop:
        time.sleep(0.01)
    if stop:
        sys.exit(143)
    time.sleep(0.2 if behavior == "slow" else 0)
(directory / "model.safetensors").write_text(str(time.monotonic()))
"""


def grid_of(tmp_path, text=GRID):
    (tmp_path / "grid.yaml").write_text(text)
    return read_grid(str(tmp_path / "grid.yaml"))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The seven runs of `GRID`."""
    return plan(grid_of(tmp_path_factory.mktemp("grid")), Path("runs"), None)


@pytest.fixture
def runs(planned, tmp_path, monkeypatch):
    """The same runs in another folder, with no more arguments than the stand-in needs."""
    monkeypatch.setattr(reproduce, "POLL_SECONDS", 0.02)
    moved = []
    for run in planned:
        config = replace(run.config, run=replace(run.config.run, dir=str(tmp_path)))
        moved.append(replace(run, argv=("--run.dir", str(tmp_path), "--run.name", run.name), config=config))
    return moved


def train(runs, jobs=1, **behaviors):
    for run in runs:
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "behavior").write_text(behaviors.get(run.name, "trains"))
    return train_all(runs, jobs, (sys.executable, "-c", STAND_IN))


def test_a_run_whose_folder_cannot_be_made_fails_alone(runs):
    runs[0].directory.write_text("a file")
    for run in runs[1:3]:
        run.directory.mkdir()
        (run.directory / "behavior").write_text("trains")
    failed, stopped_by = train_all(runs[:3], 1, (sys.executable, "-c", STAND_IN))
    assert set(failed) == {runs[0].name} and "File exists" in failed[runs[0].name] and stopped_by == 0


def text_of(run, file):
    path = run.directory / file
    return path.read_text() if path.exists() else ""


def once_running(runs, act):
    """Do ``act`` in a thread once all ``runs`` have trained an epoch."""

    def wait():
        while not all(text_of(run, "pid") for run in runs):
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_a_grid_file_becomes_runs_with_first_seeds_first(planned):
    first = ["mrl_seed0", "ff8_seed0", "ff512_seed0", "tuned_seed0"]
    assert [run.name for run in planned] == [*first, "mrl_seed1", "ff8_seed1", "ff512_seed1"]
    ff8, tuned = planned[5].config, planned[3].config
    assert (ff8.head.nesting_list, ff8.run.seed, ff8.train.epochs) == ([8], 1, 2)
    assert tuned.model.init == "runs/ff512_seed0"


def test_other_epochs_and_seeds(tmp_path):
    grid = grid_of(tmp_path)
    # Seed 7 has no run that starts from the weights of seed 0.
    short = plan(grid, tmp_path, None, seeds=[7], epochs=1)
    assert [run.name for run in short] == ["mrl_seed7", "ff8_seed7", "ff512_seed7"]
    assert {(run.config.train.epochs, run.config.optim.warmup_epochs) for run in short} == {(1, 0.5)}


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_shipped_grids_have_what_the_effects_need(tmp_path, name):
    grid = read_grid(name)
    runs = plan(grid, tmp_path, tmp_path / "data")
    main_group = [run.config for run in runs if run.entry.group == runs[0].entry.group]
    found = {(str(config.head.nesting_list), config.head.tied, config.run.seed) for config in main_group}
    kinds = [("auto", False), ("auto", True), *((f"[{dim}]", False) for dim in default_nesting_list(2048))]
    assert found == {(*kind, seed) for kind in kinds for seed in range(3)}
    first = main_group[0]  # what is compared differs in nothing else but the rate
    for config in main_group:
        rate = replace(config.optim, lr=first.optim.lr)
        assert replace(config, run=first.run, head=first.head, optim=rate) == first
    assert os.path.isfile(grid.superclasses)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("title: Digits", "titel: Digits", ["grid.yaml", "titel"]),
        ("seeds: [0, 1]}", "seeds: 0}", ["seeds", "list"]),
        ("init_from: ff512_seed0", "init_from: ff512_seed1", ["tuned_seed0", "ff512_seed1", "not a run before it"]),
        ("name: tuned,", "name: mrl,", ["two runs of the grid are called mrl_seed0"]),
        ("train.epochs: 2", "train.epoch: 2", ["run mrl_seed0", "train.epoch", "did you mean train.epochs"]),
        ("{other: [mrl_seed0]}", "{other: [mrl]}", ["references", "mrl"]),
    ],
)
def test_an_invalid_grid_file_is_refused(tmp_path, old, new, parts):
    assert old in GRID
    with pytest.raises(UserError) as caught:
        plan(grid_of(tmp_path, GRID.replace(old, new)), tmp_path, None)
    assert all(part in str(caught.value) for part in parts)


def test_a_subset_links_some_classes_and_holds_out_training_images(tmp_path):
    for split, name, number in itertools.product(("train", "val"), "abcde", range(7)):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}{number}.JPEG").touch()
    grid = grid_of(tmp_path)
    for _ in range(2):  # the second time it exists
        make_subset(tmp_path / "data", replace(grid, every_nth_class=2), tmp_path / "half")
        make_subset(tmp_path / "data", replace(grid, hold_out_every_nth=3), tmp_path / "slice")
    assert sorted(path.name for path in (tmp_path / "half" / "train").iterdir()) == ["a", "c", "e"]
    assert (tmp_path / "half" / "val" / "c" / "val1.JPEG").is_file()
    found = {
        split: sorted(path.name for path in (tmp_path / "slice" / split / "b").iterdir()) for split in ("train", "val")
    }
    assert found == {"train": [f"train{i}.JPEG" for i in (1, 2, 4, 5)], "val": [f"train{i}.JPEG" for i in (0, 3, 6)]}
    (tmp_path / "data").rename(tmp_path / "moved")
    make_subset(tmp_path / "moved", grid, tmp_path / "half")
    assert (tmp_path / "half" / "val" / "c" / "val1.JPEG").is_file()
    make_subset(tmp_path / "moved", replace(grid, hold_out_every_nth=2, every_nth_class=2), tmp_path / "slice")
    train, val = ({path.name for path in (tmp_path / "slice" / of).glob("*/*")} for of in ("train", "val"))
    assert not train & val, "no link of the split before is left"
    assert sorted(path.name for path in (tmp_path / "slice" / "val").iterdir()) == ["a", "c", "e"]
    assert (tmp_path / "moved" / "train" / "b" / "train1.JPEG").is_file()


def test_a_run_has_the_image_settings_of_the_run_it_starts_from_even_if_that_came_after_the_plan(tmp_path):
    text = GRID.replace(
        "recipe: digits_mrl, seeds: [0], init_from", "recipe: resnet50_finetune_fc, seeds: [0], init_from"
    )
    [run] = [run for run in plan(grid_of(tmp_path, text), tmp_path, None) if run.entry.init_from]
    run.directory.mkdir()
    (tmp_path / "ff512_seed0").mkdir()
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_px": 32, "resize_px": 36}
    (tmp_path / "ff512_seed0" / "model.json").write_text(json.dumps(about))
    (run.directory / "config.yaml").write_text(to_yaml(parse_command_line(run.argv, "")))
    assert "36" in (run.directory / "config.yaml").read_text() and not run.is_finished()
    (run.directory / "config.yaml").write_text(to_yaml(run.config))
    with pytest.raises(UserError, match=r"data\.mean|data\.eval"):
        run.is_finished()


def test_finished_runs_are_skipped_and_others_resumed(runs):
    assert train(runs[:1]) == ({}, 0)
    runs[1].directory.mkdir()
    (runs[1].directory / "metrics.jsonl").write_text('{"epoch": 1, "top_1/8": 0.1}\n')
    assert train(runs[:2]) == ({}, 0)
    assert [text_of(run, "starts") for run in runs[:2]] == ["0 ", "1 "]
    assert runs[1].is_finished() and runs[1].epochs_done() == 2 and runs[1].seconds() > 0


def test_a_failed_or_killed_run_stops_only_those_that_start_from_it(runs):
    killed, good, bad, after = runs[:4]
    once_running([killed], lambda: os.kill(int(text_of(killed, "pid")), signal.SIGKILL))
    failed, stopped_by = train(runs[:4], mrl_seed0="waits", ff512_seed0="fails")
    assert good.is_finished() and not stopped_by and not text_of(after, "starts")
    log = bad.directory / "train.log"
    assert failed["mrl_seed0"].startswith("train.py was killed by SIGKILL; ")
    assert failed["ff512_seed0"] == f"train.py ended with exit status 1; last line of {log}: out of memory"
    assert failed["tuned_seed0"] == "it starts from ff512_seed0, which failed"


def test_a_run_waits_for_the_one_it_starts_from(runs):
    assert train([runs[2], runs[3]], jobs=2, ff512_seed0="slow") == ({}, 0)
    assert float(text_of(runs[2], "model.safetensors")) < float(text_of(runs[3], "began"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_children_and_the_same_call_resumes(runs, number):
    waiting = {run.name: "waits" for run in runs[:3]}
    once_running(runs[:2], lambda: os.kill(os.getpid(), number))
    assert train(runs[:3], jobs=2, **waiting) == ({}, number)
    assert [text_of(run, "starts") for run in runs[:3]] == ["0 ", "0 ", ""]  # two at a time, and no more
    assert train(runs[:3], jobs=2) == ({}, 0)
    assert [text_of(run, "starts") for run in runs[:3]] == ["0 1 ", "0 1 ", "0 "]


def test_children_share_the_gpus_or_the_cores(monkeypatch):
    monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slot_environments(3)] == ["3", "5", "3"]
    monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(reproduce.torch, "get_num_threads", lambda: 4)
    assert slot_environments(2) == [{"OMP_NUM_THREADS": "2"}] * 2


def test_the_list_estimates_the_time_left(runs):
    assert list_runs(runs, runs[:2], 2).endswith("2 runs; training left, added up: 0 h 08 min")
    assert list_runs(runs, runs[:2], None).endswith("unknown")
    train(runs[:2], ff8_seed0="fails")
    (runs[0].directory / "attempts.jsonl").write_text('{"seconds": 35.0}\n{"seconds": 35.0}\n')
    (runs[1].directory / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2, "l')  # killed while it was writing
    text = list_runs(runs, runs[:2], 2)
    assert "finished" in text and "50% done" in text and text.endswith("added up: 35 s")


def test_a_run_with_other_settings_is_refused(runs):
    run = runs[0]
    before = replace(run.config, train=replace(run.config.train, epochs=3))
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(to_yaml(before))
    with pytest.raises(UserError, match=r"other settings \(train\.epochs was 3, now 2\).*another --runs"):
        run.is_finished()


# A ViT of one block, 32 wide, on handwritten digits.
DIGITS = """
title: Digits
set:
  model.backbone: vit_tiny_patch16_224
  model.kwargs: {img_size: 16, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}
  head.nesting_list: [8, 16, 32]
  data.train_px: 16
  data.eval_resize_px: 16
  data.eval_px: 16
  data.batch_size: 256
runs:
  - {name: mrl, group: digits, recipe: digits_mrl, seeds: [0]}
"""


def grid_argv(tmp_path, text):
    (tmp_path / "grid.yaml").write_text(text)
    return ["--grid", str(tmp_path / "grid.yaml"), "--runs", str(tmp_path / "runs"), "--epochs", "1"]


def test_a_sweep_writes_accuracy_by_learning_rate_and_the_best_rates(tmp_path, monkeypatch):
    """With made-up accuracies: the larger the dim, the smaller the best rate."""

    def train_quickly(runs, jobs):
        for run in runs:
            run.directory.mkdir(parents=True, exist_ok=True)
            dims, lr = run.config.head.nesting_list, run.config.optim.lr
            top_1 = {f"top_1/{dim}": 0.9 - abs(math.log10(lr * dim)) / 9 for dim in dims}
            (run.directory / "metrics.jsonl").write_text(json.dumps({"epoch": 1} | top_1) + "\n")
            (run.directory / "model.safetensors").touch()
        return {}, 0

    monkeypatch.setattr(reproduce, "train_all", train_quickly)
    sweep = DIGITS.replace("seeds: [0]}", "seeds: [0], lrs: [0.1, 0.03, 0.01]}") + (
        "  - {name: ff, group: digits, recipe: digits_ff, seeds: [0], dims: [8, 32], lrs: [0.1, 0.03, 0.01]}\n"
    )
    assert main([*grid_argv(tmp_path, sweep), "--out", str(tmp_path / "out")]) == 0
    frame = pd.read_csv(tmp_path / "out" / "learning_rates.csv")
    assert len(frame) == 3 * 3 + 2 * 3 and (tmp_path / "out" / "learning_rates.png").stat().st_size > 10_000
    found = best_rates(tmp_path / "out" / "learning_rates.csv")
    assert found == {("FF", 8): 0.1, ("FF", 32): 0.03, ("MRL", 0): 0.1}
    assert main(grid_argv(tmp_path, sweep.replace("0.03", "0.02"))) == 0  # runs of this folder, with others
    assert len(pd.read_csv(tmp_path / "runs" / "results" / "digits" / "learning_rates.csv")) == len(frame), "a trial"
    variants = frame.assign(name=np.where(frame["lr"] > 0.02, "mrl_new", "mrl_old"))[frame["method"] == "MRL"]
    labels = [text.get_text() for text in draw(variants).legends[0].get_texts()]
    assert labels == ["mrl_new", "mrl_old"], "variants of one method have lines of their own"
    apart = frame[frame["method"] == "FF"]
    apart = apart.assign(name="ff" + apart["dim"].astype(str))
    assert [axes.get_title() for axes in draw(apart).axes] == ["8 dims", "32 dims"], "entries that share no size"


def test_a_sweep_whose_runs_all_fail_keeps_the_results_of_the_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "train_all", lambda runs, jobs: ({run.name: "no weights" for run in runs}, 0))
    (tmp_path / "learning_rates.csv").write_text("kept")
    sweep = DIGITS.replace("seeds: [0]}", "seeds: [0], lrs: [0.1, 0.03]}")
    assert main([*grid_argv(tmp_path, sweep), "--out", str(tmp_path)]) == 1
    assert (tmp_path / "learning_rates.csv").read_text() == "kept"
    assert "failed: mrl_lr0.1_seed0: no weights" in capsys.readouterr().err


def test_the_digits_grid_by_name_leaves_the_committed_results_and_documents_alone(tmp_path, monkeypatch):
    written = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "train_all", lambda runs, jobs: ({}, 0))
    monkeypatch.setattr(reproduce, "evaluate", lambda *given: written.append(given[-1]) or [])
    monkeypatch.setattr(reproduce, "write_report", lambda out, documents: written.append(documents) or [])
    assert main(["--grid", "digits"]) == 0
    assert written == [Path("runs/grid_digits/results"), ()]


@pytest.mark.parametrize(("finished", "published"), [(1, False), (2, True)])
def test_only_a_complete_grid_replaces_the_committed_results(tmp_path, monkeypatch, finished, published):
    text = DIGITS.replace("seeds: [0]}", "seeds: [0, 1]}")
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(reproduce, "GRIDS", tmp_path)
    monkeypatch.setattr(reproduce, "train_all", lambda runs, jobs: ({}, 0))
    monkeypatch.setattr(reproduce.Run, "is_finished", lambda run: run.config.run.seed < finished)
    monkeypatch.setattr(reproduce, "evaluate", lambda *given: [])
    written = []
    monkeypatch.setattr(reproduce, "write_report", lambda out, documents: written.append((out, documents)) or [])
    assert main(["--grid", "mine", "--runs", str(tmp_path / "runs"), "--only", "*seed0"]) == 0
    assert written == [(reproduce.RESULTS, reproduce.DOCUMENTS) if published else (tmp_path / "runs" / "results", ())]


def test_one_command_trains_evaluates_and_reports(tmp_path, capfd):
    argv = grid_argv(tmp_path, f"evaluation: [--max_queries, '40', --skip, quantization]\n{DIGITS}")
    assert main(argv) == 0
    out = tmp_path / "runs" / "results" / "digits"
    rows = read_rows(out / "results.jsonl")
    assert {row.run for row in rows} == {"mrl_seed0"} and not (out / "classes.csv").exists()
    trained = json.loads((tmp_path / "runs" / "mrl_seed0" / "metrics.jsonl").read_text().splitlines()[-1])
    [row] = [r for r in rows if (r.study, r.metric, r.dim) == ("classification", "top_1", 8)]
    assert row.value == pytest.approx(trained["top_1/8"], abs=0.01)
    record = json.loads((out / "provenance.json").read_text())
    run = record["runs"]["mrl_seed0"]
    assert (run["recipe"], run["seed"], run["starts"]) == ("digits_mrl", 0, 1) and run["seconds"] > 0
    assert str(tmp_path) not in (out / "provenance.json").read_text()  # no paths of the machine
    assert "Digits: 1 runs, seed 0" in (out / "tables.md").read_text()
    capfd.readouterr()
    assert main([*argv, "--list"]) == 0
    assert " finished " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("argv", "outcome", "status", "message"),
    [
        (["--jobs", "0"], None, 2, "--jobs is 0; allowed: 1 or more"),
        (["--only", "tune*", "x*"], None, 2, "--only tune* x* matches no run; runs: mrl_seed0"),
        (["--grid", "none"], None, 2, "--grid is 'none', which is not a file; allowed: a, b"),
        ([], ({"mrl_seed0": "killed by SIGKILL"}, 0), 1, "failed: mrl_seed0: killed by SIGKILL"),
        ([], ({}, signal.SIGINT), 130, "stopped; the same command resumes"),
    ],
)
def test_the_exit_status_and_the_message_tell_what_went_wrong(
    tmp_path, capsys, monkeypatch, argv, outcome, status, message
):
    monkeypatch.setattr(reproduce, "train_all", lambda runs, jobs: outcome)
    assert main([*grid_argv(tmp_path, DIGITS), *argv]) == status
    assert message in capsys.readouterr().err
