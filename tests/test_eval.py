"""eval.py end to end: handwritten digits, models that were never trained."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchcodec.encoders import PngEncoder

import eval as script  # not `eval`, which is Python's own
from mrl import explore
from mrl.config import DataConfig
from mrl.data import build_data
from mrl.data.memory import MemoryImages
from mrl.errors import UserError
from mrl.model import load
from mrl.results import read_rows, write_rows
from mrl.studies import run as run_module

REPOSITORY = Path(script.__file__).parent
CPU = torch.device("cpu")
DRAWN = ("accuracy_by_dim", "neighbors")

DATA = DataConfig(name="digits", batch_size=64, train_px=16, eval_resize_px=16, eval_px=16)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_digits_run):
    """Runs MRL and FF, evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_digits_run(folder / "mrl", (8, 16, 32)), make_digits_run(folder / "ff", (32,), seed=1)]
    with pytest.MonkeyPatch.context() as patch:  # two figures as files: the others take long
        write = script.save
        patch.setattr(script, "save", lambda *of: write(*of) if of[1].name.startswith(DRAWN) else [])
        assert script.main(["--runs", *map(str, runs)]) == 0
    return folder


@pytest.fixture
def runs(finished, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


@pytest.fixture
def no_pictures(monkeypatch):
    """Draws no picture of images, and no file of a figure, which takes long."""
    monkeypatch.setattr(script, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(script, "save", lambda figure, stem: [Path(f"{stem}.png")])


@pytest.fixture
def no_images(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("images were read again")

    monkeypatch.setattr(run_module, "build_data", refuse)


def untimed(path):
    return [dataclasses.replace(row, ms_per_query=None) for row in read_rows(path)]


def test_accuracies_are_those_of_the_models_themselves(finished):
    rows = [row for row in read_rows(finished / "eval" / "results.jsonl") if row.study == "classification"]
    found = {(row.run, row.method, row.dim, row.metric): (row.value, row.n) for row in rows}
    images = build_data(DATA, 0, CPU, splits=("val",))["val"]
    [(batch, labels)] = images.eval_batches([np.arange(len(images))])
    for name, method in (("mrl", "MRL"), ("ff", "FF")):
        model = load(finished / name)
        with torch.no_grad():
            logits = model(batch)
        for dim, of_dim in zip(model.head.nesting_list, logits, strict=True):
            best = of_dim.topk(5).indices == labels[:, None]
            for metric, right in {"top_1": best[:, 0], "top_5": best.any(1)}.items():
                assert found[name, method, dim, metric] == (right.sum().item() / 355, 355)


def test_rows_hold_every_study_and_the_fixed_feature_model_also_truncated(finished):
    rows = read_rows(finished / "eval" / "results.jsonl")
    dims = {}
    for row in rows:
        dims.setdefault((row.study, row.method, row.metric), []).append(row.dim)
    of_retrieval = ["top_1", *(f"{name}@{k}" for k in (10, 25, 50, 100) for name in ("map", "precision", "recall"))]
    for method, trained in {"MRL": [8, 16, 32], "FF": [32], "FF truncated": [8, 16, 32]}.items():
        assert dims["classification", method, "top_1"] == dims["classification", method, "top_5"] == trained
        between = [8, 12, 16, 24, 32] if method == "MRL" else trained
        assert all(dims["retrieval", method, metric] == between for metric in of_retrieval)
    studies = {run: {row.study for row in rows if row.run == run} for run in ("mrl", "ff")}
    assert studies["ff"] == {"classification", "retrieval", "quantization", "similarity", "per_class", "cascade"}
    assert studies["mrl"] - studies["ff"] == {"adaptive_retrieval", "funnel_retrieval", "oracle"}
    baselines = {"FF PCA", "FF SVD", "FF random coordinates", "FF random projection", "FF low-rank classifier"}
    baselines |= {"FF LDA", "FF supervised map", "FF unsupervised map", "FF random coordinates, probe"}
    assert baselines <= {row.method for row in rows if row.run == "ff"}
    assert {row.study for row in rows if row.flip} == {"cascade", "oracle"}, "trained on mirrored images too"
    shared = {(row.dataset, row.resize_px, row.crop_px, row.run, row.seed) for row in rows}
    assert shared == {("digits", 16, 16, "mrl", 0), ("digits", 16, 16, "ff", 1)}
    at_full_width = [row.value for row in rows if row.run == "ff" and row.dim == 32 and row.metric == "top_1"]
    assert len(set(at_full_width[:2])) == 1, "truncated to its full width it is itself"


def test_a_second_evaluation_reads_no_image_and_gives_the_same(runs, no_images, no_pictures, capsys):
    before = [row for row in untimed(runs / "eval" / "results.jsonl") if row.run == "mrl"]
    # The results' own folder, as a shell's runs/* brings it, is not taken for a run.
    assert script.main(["--runs", str(runs / "mrl"), str(runs / "eval")]) == 0
    assert untimed(runs / "eval" / "results.jsonl") == before
    output = capsys.readouterr().out
    assert f"figure: {runs / 'eval' / 'accuracy_by_dim_digits.png'}" in output and "classification, top_1 (%)" in output
    for name in DRAWN:  # by the first evaluation
        assert all((runs / "eval" / f"{name}_digits.{kind}").stat().st_size > 1000 for kind in ("png", "pdf"))
    record = json.loads((runs / "eval" / "provenance.json").read_text())
    assert record["runs"] == {"mrl": str(runs / "mrl")}


def test_all_zero_prefixes_are_counted(runs, no_pictures, monkeypatch, capsys):
    for path in runs.glob("*/embeddings/val/vectors.npy"):
        vectors = np.load(path)
        vectors[:3, :8] = 0
        np.save(path, vectors)
    monkeypatch.setattr(script, "run_studies", lambda *_: [])
    assert script.main(["--runs", str(runs / "mrl"), str(runs / "ff")]) == 0
    counted = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "all-zero" in line]
    assert counted == [f"{name}: all-zero prefixes: 3 at 8 dims" for name in ("mrl", "ff")]


def test_options_reach_the_embedding_pass_the_studies_and_wandb(runs, tmp_path, no_pictures, monkeypatch):
    lines = [f"{digit}\t{'odd' if digit % 2 else 'even'}\n" for digit in range(10)]
    (tmp_path / "table.tsv").write_text("class\tsuperclass\n" + "".join(lines))
    seen, embed = [], script.embed_runs

    def embed_runs(runs, transfer, size, force, process, precision, settings):
        seen.append((size, force, precision))
        return embed(runs, transfer, size, False, process)

    monkeypatch.setattr(script, "embed_runs", embed_runs)
    monkeypatch.setattr(script, "run_studies", lambda run, device, table, *_: seen.append(table) or [])
    monkeypatch.setattr(script, "report_evaluation", lambda *given: seen.append(given))
    argv = ["--runs", str(runs / "mrl"), "--batch_size", "7", "--force", "--precision", "bf16"]
    argv += ["--superclasses", str(tmp_path / "table.tsv"), "--wandb", "offline", "--wandb_artifacts"]
    assert script.main(argv) == 0
    how, table, (named, rows, record, mode, artifacts) = seen
    assert how == (7, True, "bf16") and table["3"] == "odd" and record["precision"] == "bf16"
    assert named == {"mrl": runs / "mrl"} and (rows, mode, artifacts) == ([], "offline", True)


def test_a_run_s_validation_images_can_be_explored(runs, capsys, monkeypatch):
    listed, build = [], run_module.build_data

    def slowly(*given):
        listed.append(given[4])
        time.sleep(0.2)
        return build(*given)

    monkeypatch.setattr(run_module, "build_data", slowly)
    monkeypatch.setattr(explore, "cores_per_process", lambda: 4)
    assert explore.main(["--run", str(runs / "mrl"), "--max_images", "30"]) == 0
    printed = capsys.readouterr().out
    assert f"{runs / 'mrl' / 'explore.html'}: 30 images" in printed and "30 of 355 images, chosen" in printed
    [data] = re.findall(r'type="application/json" id="data">(.*)</script>', (runs / "mrl/explore.html").read_text())
    content = json.loads(data)
    assert content["trained"] == [8, 16, 32] and content["title"] == "digits, validation images, by mrl"
    run = run_module.open_run(runs / "mrl")
    for name, folder in zip(content["names"], content["folderOf"], strict=True):
        digit, index = name.split(", validation image ")
        assert digit == content["folders"][folder] == str(run.val.labels[int(index)])
    assert listed == [("val",)], "once, before many threads ask for pictures"


def test_a_study_that_fails_loses_no_rows_of_the_runs_before(runs, no_pictures, monkeypatch, capsys):
    of_mrl = [row for row in untimed(runs / "eval" / "results.jsonl") if row.run == "mrl"]

    def failing(run, *arguments):
        if run.source.run == "ff":
            raise UserError("it fails")
        return of_mrl

    monkeypatch.setattr(script, "run_studies", failing)
    assert "it fails" in refused(capsys, "--runs", str(runs / "mrl"), str(runs / "ff"), "--out", str(runs / "new"))
    assert read_rows(runs / "new" / "results.jsonl") == of_mrl
    assert (runs / "new" / "provenance.json").is_file()


def test_ctrl_c_is_one_line_and_the_same_command_resumes(tmp_path, make_digits_run, no_pictures, monkeypatch, capsys):
    run = make_digits_run(tmp_path / "mrl", (8, 16, 32))
    monkeypatch.setattr(script, "run_studies", lambda *arguments: [])
    whole, batches = MemoryImages._center_crops, []

    def read(self, indices):
        batches.append(len(indices))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return whole(self, indices)

    monkeypatch.setattr(MemoryImages, "_center_crops", read)
    assert script.main(["--runs", str(run)]) == 130
    assert "the same command" in capsys.readouterr().err.splitlines()[-1]
    assert script.main(["--runs", str(run)]) == 0
    embedded = sum(len(np.load(labels)) for labels in run.glob("embeddings/*/labels.npy"))
    assert sum(batches) - batches[2] == embedded, "no image twice"


def test_two_processes_give_the_same_rows_as_one(runs):
    before = [row for row in untimed(runs / "eval" / "results.jsonl") if (row.run, row.code) == ("mrl", None)]
    embeddings = (runs / "mrl" / "embeddings").rename(runs / "of_one_process")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "eval.py", "--batch_size", "100"]
    command += ["--skip", "quantization", "--runs", str(runs / "mrl")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for path in embeddings.glob("*/vectors.npy"):
        two = np.load(runs / "mrl" / "embeddings" / path.parent.name / "vectors.npy")
        # Bits may depend on the batch size, here 256 and 100.
        np.testing.assert_allclose(two, np.load(path), rtol=0, atol=1e-6)
    assert untimed(runs / "eval" / "results.jsonl") == before
    assert done.stdout.count("figure: ") == len(set(done.stdout.split("figure: "))) - 1, "only one process prints"
    assert json.loads((runs / "eval" / "provenance.json").read_text())["world_size"] == 2


def refused(capsys, *argv):
    assert script.main(list(argv)) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_run_that_lacks_a_file_is_named_before_anything_is_computed(runs, capsys, no_images):
    for file in ("model.safetensors", "model.json", "config.yaml"):
        (runs / "ff" / file).unlink()
        line = refused(capsys, "--runs", str(runs / "mrl"), str(runs / "ff"), "--force")
        assert str(runs / "ff") in line and file in line


def test_runs_of_one_name_are_told_apart_by_their_folder_or_refused(runs, tmp_path, capsys):
    a, b, deep = (Path(shutil.copytree(runs / "mrl", tmp_path / folder / "mrl")) for folder in ("a", "b", "deep/a"))
    assert script.name_runs([a, b, runs / "ff"]) == {"a/mrl": a, "b/mrl": b, "ff": runs / "ff"}
    assert "share a name" in refused(capsys, "--runs", str(a), str(deep))
    other = a.rename(tmp_path / "a" / "cafe\u0301")
    assert script.name_runs([other]) == {"caf\u00e9": other}, "as rows call it"
    assert "each once" in refused(capsys, "--runs", str(runs / "mrl"), f"{runs}/../runs/mrl")


def test_other_mistakes_are_one_sentence(runs, scans, tmp_path, capsys, no_images):
    run, rows, none = ("--runs", str(runs / "ff")), str(runs / "eval" / "results.jsonl"), str(tmp_path / "none")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "others.tsv").write_text("class\tsuperclass\nant\tinsect\n")
    for argv, said in (
        (("--runs", none), "none has no config.yaml"),
        ((*run, "--batch_size", "0"), "--batch_size is 0"),
        ((*run, "--max_queries", "0"), "--max_queries is 0"),
        ((*run, "--wandb_artifacts"), "needs --wandb"),
        ((*run, "--out", str(runs / "mrl")), "mrl is the directory of a run, and would lose its provenance.json"),
        (("--redraw", none), "does not exist"),
        (("--redraw", str(tmp_path / "empty.jsonl")), "holds no rows"),
        *((("--redraw", rows, *of), f"{of[0]} needs --runs") for of in (("--few_shot", none), ("--force",))),
        ((*run, "--robustness", f"imagenet-a={scans}"), "no dataset is called 'imagenet-a'"),
        ((*run, "--robustness", f"imagenet_r={scans}"), "imagenet_r has 200 class folders"),
        ((*run, "--retrieval", *[str(scans)] * 3), "queries and a database"),
        ((*run, "--renaming", none), "trained_class"),
        ((*run, "--superclasses", str(tmp_path / "others.tsv")), "none of the 10 classes"),
    ):
        assert said in refused(capsys, *argv)


def test_data_whose_classes_are_not_the_trained_ones_are_refused(runs, capsys):
    info = json.loads((runs / "ff" / "model.json").read_text())
    info["classes"] = [*info["classes"][:-1], "ten"]
    (runs / "ff" / "model.json").write_text(json.dumps(info))
    assert "ff was trained on the classes 10" in refused(capsys, "--runs", str(runs / "ff"))
    assert "classes differ" in refused(capsys, "--runs", str(runs / "mrl"), str(runs / "ff"))


@pytest.fixture
def scans(tmp_path):
    """Digits from the validation images, a folder per class: 12 of each of 3, 7 and 8."""
    images = build_data(DATA, 0, CPU, splits=("val",))["val"]
    for digit in (3, 7, 8):
        folder = tmp_path / "scans" / str(digit)
        folder.mkdir(parents=True)
        for row in np.flatnonzero(images.labels.numpy() == digit)[:12]:
            PngEncoder(images._images[row]).to_file(str(folder / f"{row:04}.png"))
    return tmp_path / "scans"


def test_other_images_give_rows_of_their_own_data_set(runs, scans, no_pictures, monkeypatch, capsys):
    monkeypatch.setattr(script, "run_studies", lambda *_: [])
    options = ["--robustness", str(scans), "--few_shot", str(scans), "--retrieval", str(scans)]
    assert script.main(["--runs", str(runs / "ff"), *options]) == 0
    rows = read_rows(runs / "eval" / "results.jsonl")
    assert {row.dataset for row in rows} == {"scans"}
    assert {row.study for row in rows} == {"robustness", "few_shot", "retrieval"}
    found = {(row.study, row.method, row.metric): row.value for row in rows if row.dim == 32}
    labels = np.load(runs / "ff" / "embeddings" / "val" / "labels.npy")
    images = np.concatenate([np.flatnonzero(labels == digit)[:12] for digit in (3, 7, 8)])
    vectors = np.load(runs / "ff" / "embeddings" / "val" / "vectors.npy")[images]
    with torch.no_grad():
        logits = load(runs / "ff").head(torch.from_numpy(vectors))[0][:, [3, 7, 8]].numpy()
    right = np.array([3, 7, 8])[logits.argmax(1)] == labels[images]
    assert found["robustness", "FF", "top_1"] == pytest.approx(right.mean())
    np.testing.assert_allclose(np.load(runs / "ff" / "embeddings" / "images_scans" / "vectors.npy"), vectors, atol=1e-4)
    output = capsys.readouterr().out
    for name in ("robustness_scans.png", "few_shot_scans.png", "map_by_dim_scans.png"):
        assert f"figure: {runs / 'eval' / name}" in output


def test_faults_of_other_images_are_answered_with_what_can_be_done_here(runs, scans, capsys):
    """Not with settings of a training."""
    (scans / "9").mkdir()
    assert refused(capsys, "--runs", str(runs / "ff"), "--few_shot", str(scans)).endswith(".avif; remove it")
    (scans / "9" / "1.png").write_bytes(b"no image")
    (scans / "9" / "2.png").write_bytes(b"no image")
    error = refused(capsys, "--runs", str(runs / "ff"), "--few_shot", str(scans))
    assert error.endswith("; python -m mrl.data.check DIR lists all such images, to restore or remove")


def test_fewer_queries_and_skipped_studies_change_no_other_row(runs, no_pictures):
    before, searches = untimed(runs / "eval" / "results.jsonl"), {"retrieval", "adaptive_retrieval", "funnel_retrieval"}
    options = ["--max_queries", "20", "--skip", "quantization", "baselines"]
    assert script.main(["--runs", str(runs / "mrl"), str(runs / "ff"), *options]) == 0
    rows = untimed(runs / "eval" / "results.jsonl")
    assert {row.n for row in rows if row.study in searches} == {20}
    assert {row.method for row in rows} == {"MRL", "MRL cascade", "FF", "FF truncated"}
    others = [row for row in before if row.study not in searches | {"quantization"}]
    methods = {row.method for row in rows}
    assert [row for row in rows if row.study not in searches] == [row for row in others if row.method in methods]


def test_redraw_needs_the_rows_alone_and_gives_each_data_set_its_figures(
    finished, tmp_path, no_images, no_pictures, capsys, monkeypatch
):
    rows = [row for row in read_rows(finished / "eval" / "results.jsonl") if row.study in ("retrieval", "oracle")]
    both = [*rows, *(dataclasses.replace(row, dataset="tiny_imagenet") for row in rows)]
    write_rows(both, tmp_path / "results.jsonl")
    titles, figures = [], script.figures_of
    monkeypatch.setattr(script, "figures_of", lambda of: titles.append({row.dataset for row in of}) or figures(of))
    argv = ["--redraw", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "there"), "--title", "my digits"]
    assert script.main(argv) == 0
    assert titles == [{"my digits"}, {"tiny_imagenet"}]
    names = {Path(line).name for line in capsys.readouterr().out.splitlines() if line.startswith("figure: ")}
    of_digits = {name for name in names if name.endswith("_digits.png")}
    assert {"accuracy_by_dim_digits.png", "first_correct_digits.png"} <= of_digits
    assert names - of_digits == {name.replace("_digits", "_tiny_imagenet") for name in of_digits}
