"""eval.py end to end: handwritten digits, models that were never trained."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchcodec.encoders import PngEncoder

import eval as script  # not `eval`, which is Python's own
from mrl import explore
from mrl.config import Config, DataConfig, HeadConfig, RunConfig, to_yaml
from mrl.data import build_data
from mrl.data.memory import MemoryImages
from mrl.errors import UserError
from mrl.model import ModelInfo, build_backbone, build_model, load, save_model
from mrl.results import read_rows, write_rows
from mrl.studies import run as run_module

REPOSITORY = Path(script.__file__).parent
CPU = torch.device("cpu")
# A ViT of one block, 32 wide.
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
DATA = DataConfig(name="digits", batch_size=64, train_px=16, eval_resize_px=16, eval_px=16)


def make_run(directory, nesting_list, seed=0):
    torch.manual_seed(seed)
    backbone = build_backbone("vit_tiny_patch16_224", "scratch", 4, False, VIT)
    model = build_model(backbone, 10, nesting_list)
    classes = tuple(str(digit) for digit in range(10))
    info = ModelInfo("vit_tiny_patch16_224", VIT, 4, False, nesting_list, False, classes, 16, 16, DATA.mean, DATA.std)
    directory.mkdir(parents=True)
    save_model(model, info, directory)
    run = RunConfig(name=directory.name, dir=str(directory.parent), seed=seed)
    config = Config(run=run, data=DATA, head=HeadConfig(nesting_list=list(nesting_list)))
    (directory / "config.yaml").write_text(to_yaml(config))
    return str(directory)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs MRL and FF, evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / "mrl", (8, 16, 32)), make_run(folder / "ff", (32,), seed=1)]
    assert script.main(["--runs", *runs]) == 0
    return folder


@pytest.fixture
def runs(finished, tmp_path):
    """A copy to change."""
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def no_images(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("images were read again")

    monkeypatch.setattr(run_module, "build_data", refuse)


def untimed(path):
    return [dataclasses.replace(row, ms_per_query=None) for row in read_rows(path)]


def test_accuracies_are_those_of_the_models_themselves(finished):
    rows = read_rows(finished / "eval" / "results.jsonl")
    images = build_data(DATA, 0, CPU, splits=("val",))["val"]
    [(batch, labels)] = images.eval_batches([np.arange(len(images))])
    for name in ("mrl", "ff"):
        model = load(finished / name)
        with torch.no_grad():
            logits = model(batch)
        for dim, of_dim in zip(model.head.nesting_list, logits, strict=True):
            best = of_dim.topk(5).indices == labels[:, None]
            expected = {"top_1": best[:, 0].sum().item(), "top_5": best.any(1).sum().item()}
            for metric, count in expected.items():
                [row] = [
                    row
                    for row in rows
                    if (row.study, row.run, row.dim, row.metric) == ("classification", name, dim, metric)
                    and row.method in ("MRL", "FF")
                ]
                assert row.value == count / len(images)
                assert row.n == len(images)


def test_rows_hold_every_study_and_the_fixed_feature_model_also_truncated(finished):
    rows = read_rows(finished / "eval" / "results.jsonl")
    found = {(row.study, row.metric, row.method): [] for row in rows}
    for row in rows:
        found[row.study, row.metric, row.method].append(row.dim)
    for method, dims in {"MRL": [8, 16, 32], "FF": [32], "FF truncated": [8, 16, 32]}.items():
        between = [8, 12, 16, 24, 32] if method == "MRL" else dims
        for metric in ("top_1", "top_5"):
            assert found["classification", metric, method] == dims
        for metric in ["top_1", *(f"{name}@{k}" for k in (10, 25, 50, 100) for name in ("map", "precision", "recall"))]:
            assert found["retrieval", metric, method] == between
    studies = {run: {row.study for row in rows if row.run == run} for run in ("mrl", "ff")}
    both = {"classification", "retrieval", "quantization", "similarity", "per_class", "cascade"}
    assert studies["mrl"] - both == {"adaptive_retrieval", "funnel_retrieval", "oracle"}
    assert studies["ff"] == both
    baselines = {"FF PCA", "FF SVD", "FF random coordinates", "FF random projection", "FF low-rank classifier"}
    baselines |= {"FF LDA", "FF supervised map", "FF unsupervised map", "FF random coordinates, probe"}
    assert baselines <= {row.method for row in rows if row.run == "ff"}
    assert {row.study for row in rows if row.flip} == {"cascade", "oracle"}, "trained on mirrored images too"
    assert {(row.dataset, row.resize_px, row.crop_px) for row in rows} == {("digits", 16, 16)}
    assert {(row.run, row.seed) for row in rows} == {("mrl", 0), ("ff", 1)}
    at_full_width = [row.value for row in rows if row.run == "ff" and row.dim == 32 and row.metric == "top_1"]
    assert len(set(at_full_width[:2])) == 1, "truncated to its full width it is itself"


def test_a_second_evaluation_reads_no_image_and_gives_the_same(runs, no_images, monkeypatch, capsys):
    monkeypatch.setattr(script, "draw_pictures", lambda *_: None)  # shows a few photographs
    before = untimed(runs / "eval" / "results.jsonl")
    # The results' own folder, as a shell's runs/* brings it, is not taken for a run.
    assert script.main(["--runs", *(str(runs / name) for name in ("mrl", "ff", "eval"))]) == 0
    assert untimed(runs / "eval" / "results.jsonl") == before
    output = capsys.readouterr().out
    for name in ("accuracy_by_dim_digits.png", "accuracy_by_dim_digits.pdf"):
        assert f"figure: {runs / 'eval' / name}" in output
        assert (runs / "eval" / name).stat().st_size > 1000
    assert "FF truncated" in output
    record = json.loads((runs / "eval" / "provenance.json").read_text())
    assert record["runs"] == {"mrl": str(runs / "mrl"), "ff": str(runs / "ff")}
    assert record["world_size"] == 1


def test_all_zero_prefixes_are_counted(runs, monkeypatch, capsys):
    for path in runs.glob("*/embeddings/val/vectors.npy"):
        vectors = np.load(path)
        vectors[:3, :8] = 0
        np.save(path, vectors)
    for name in ("run_studies", "draw_pictures"):
        monkeypatch.setattr(script, name, lambda *_, **__: [])
    assert script.main(["--runs", str(runs / "mrl"), str(runs / "ff")]) == 0
    counted = "all-zero prefixes: 3 at 8 dims, of 355 validation images; at these sizes they have no neighbors"
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "all-zero" in line] == [f"mrl: {counted}", f"ff: {counted}"]


def test_a_run_s_validation_images_can_be_explored(runs, capsys):
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


def test_a_study_that_fails_loses_no_rows_of_the_runs_before(runs, monkeypatch, capsys):
    of_mrl = [row for row in untimed(runs / "eval" / "results.jsonl") if row.run == "mrl"]
    whole = script.run_studies

    def failing(run, *arguments):
        if run.source.run == "ff":
            raise UserError("it fails")
        return whole(run, *arguments)

    monkeypatch.setattr(script, "run_studies", failing)
    assert "it fails" in refused(capsys, "--runs", str(runs / "mrl"), str(runs / "ff"), "--out", str(runs / "new"))
    assert untimed(runs / "new" / "results.jsonl") == of_mrl
    assert (runs / "new" / "provenance.json").is_file()


def test_ctrl_c_is_one_line_and_the_same_command_resumes(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "mrl", (8, 16, 32))
    monkeypatch.setattr(script, "run_studies", lambda *arguments: [])
    monkeypatch.setattr(script, "draw_pictures", lambda *arguments: None)  # it reads images too
    whole, batches = MemoryImages._center_crops, []

    def read(self, indices):
        if len(batches) == 2:
            batches.append(0)
            raise KeyboardInterrupt
        batches.append(len(indices))
        return whole(self, indices)

    monkeypatch.setattr(MemoryImages, "_center_crops", read)
    assert script.main(["--runs", run]) == 130
    assert "the same command" in capsys.readouterr().err.splitlines()[-1]
    assert script.main(["--runs", run]) == 0
    assert sum(batches) == sum(len(np.load(labels)) for labels in Path(run).glob("embeddings/*/labels.npy"))


def test_two_processes_give_the_same_rows_as_one(runs):
    before = [row for row in untimed(runs / "eval" / "results.jsonl") if row.run == "mrl"]
    embeddings = (runs / "mrl" / "embeddings").rename(runs / "of_one_process")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "eval.py", "--batch_size", "100"]
    done = subprocess.run(
        [*command, "--runs", str(runs / "mrl")],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
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


@pytest.mark.parametrize("file", ["model.safetensors", "model.json", "config.yaml"])
def test_a_run_that_lacks_a_file_is_named_before_anything_is_computed(runs, capsys, no_images, file):
    (runs / "ff" / file).unlink()
    line = refused(capsys, "--runs", str(runs / "mrl"), str(runs / "ff"), "--force")
    assert str(runs / "ff") in line and file in line
    assert (runs / "mrl" / "embeddings" / "val" / "vectors.npy").exists()


def test_runs_of_one_name_are_told_apart_by_their_folder_or_refused(runs, tmp_path, capsys):
    a, b, deep = (Path(shutil.copytree(runs / "mrl", tmp_path / folder / "mrl")) for folder in ("a", "b", "deep/a"))
    assert script.name_runs([a, b, runs / "ff"]) == {"a/mrl": a, "b/mrl": b, "ff": runs / "ff"}
    assert "share a name" in refused(capsys, "--runs", str(a), str(deep))
    assert "each once" in refused(capsys, "--runs", str(runs / "mrl"), f"{runs}/../runs/mrl")


def test_other_mistakes_are_one_sentence(runs, tmp_path, capsys):
    assert "none has no config.yaml" in refused(capsys, "--runs", str(tmp_path / "none"))
    for option in ("--batch_size", "--max_queries"):
        assert f"{option} is 0" in refused(capsys, "--runs", str(runs / "mrl"), option, "0")
    assert "does not exist" in refused(capsys, "--redraw", str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no rows" in refused(capsys, "--redraw", str(tmp_path / "empty.jsonl"))
    rows = str(runs / "eval" / "results.jsonl")
    for option in (("--few_shot", "DIR"), ("--max_queries", "5"), ("--wandb", "online"), ("--force",)):
        assert f"{option[0]} needs --runs" in refused(capsys, "--redraw", rows, *option)
    assert "needs --wandb" in refused(capsys, "--runs", str(runs / "mrl"), "--wandb_artifacts")


def test_data_whose_classes_are_not_the_trained_ones_are_refused(runs, capsys):
    info = json.loads((runs / "ff" / "model.json").read_text())
    info["classes"] = [*info["classes"][:-1], "ten"]
    (runs / "ff" / "model.json").write_text(json.dumps(info))
    assert "ff was trained on 10 classes" in refused(capsys, "--runs", str(runs / "ff"))
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


def test_other_images_give_rows_of_their_own_data_set_and_are_embedded_once(runs, scans, capsys):
    options = ["--robustness", str(scans), "--few_shot", str(scans), "--retrieval", str(scans)]
    assert script.main(["--runs", str(runs / "ff"), *options]) == 0
    [_, *others] = dict.fromkeys(row.dataset for row in read_rows(runs / "eval" / "results.jsonl"))
    assert others == ["scans"]
    rows = [row for row in read_rows(runs / "eval" / "results.jsonl") if row.dataset == "scans"]
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


def test_mistakes_about_other_images_are_one_sentence(runs, scans, tmp_path, capsys, no_images):
    run = ["--runs", str(runs / "ff")]
    assert "no dataset is called 'imagenet-a'" in refused(capsys, *run, "--robustness", f"imagenet-a={scans}")
    assert "imagenet_r has 200 class folders" in refused(capsys, *run, "--robustness", f"imagenet_r={scans}")
    assert "is not a folder" in refused(capsys, *run, "--few_shot", str(tmp_path / "none"))
    assert "queries and a database" in refused(capsys, *run, "--retrieval", *[str(scans)] * 3)
    assert "trained_class" in refused(capsys, *run, "--renaming", str(tmp_path / "none.tsv"))


def test_max_queries_is_the_n_of_all_retrieval_rows_and_of_no_others(runs):
    all_rows = untimed(runs / "eval" / "results.jsonl")
    searches = {"retrieval", "quantization", "adaptive_retrieval", "funnel_retrieval"}
    before = {row for row in all_rows if row.study not in searches and row.run == "mrl"}
    assert script.main(["--runs", str(runs / "mrl"), "--max_queries", "20"]) == 0
    rows = untimed(runs / "eval" / "results.jsonl")
    assert {row.n for row in rows if row.study in searches} == {20}
    assert {row for row in rows if row.study not in searches} == before


def test_skipped_studies_are_the_only_rows_that_are_missing(runs):
    before = untimed(runs / "eval" / "results.jsonl")
    assert script.main(["--runs", str(runs / "mrl"), str(runs / "ff"), "--skip", "quantization", "baselines"]) == 0
    baselines = {row.method for row in before if row.method.startswith("FF ")} - {"FF truncated"}
    kept = [row for row in before if row.study != "quantization" and row.method not in baselines]
    assert baselines and untimed(runs / "eval" / "results.jsonl") == kept


def test_redraw_needs_the_rows_alone_and_gives_each_data_set_its_figures(finished, tmp_path, no_images, capsys):
    rows = read_rows(finished / "eval" / "results.jsonl")
    both = [*rows, *(dataclasses.replace(row, dataset="tiny_imagenet") for row in rows)]
    write_rows(both, tmp_path / "results.jsonl")
    assert script.main(["--redraw", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "there")]) == 0
    names = {path.name for path in (tmp_path / "there").glob("*.png")}
    of_digits = {name for name in names if name.endswith("_digits.png")}
    assert {"accuracy_by_dim_digits.png", "adaptive_retrieval_mrl_digits.png"} <= of_digits
    assert names - of_digits == {name.replace("_digits", "_tiny_imagenet") for name in of_digits}
    assert f"figure: {tmp_path / 'there' / 'accuracy_by_dim_digits.png'}" in capsys.readouterr().out
