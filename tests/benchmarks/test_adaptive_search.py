"""The benchmark of adaptive retrieval, on the embeddings of a small untrained model."""

import json

import numpy as np
import pytest
import torch

from mrl import distributed
from mrl.config import Config, DataConfig, HeadConfig, RunConfig, to_yaml
from mrl.data import build_data
from mrl.model import ModelInfo, build_backbone, build_model, load, save_model
from mrl.results import Source
from mrl.retrieval.embeddings import embed_split, embeddings_path
from mrl.rundir import atomic_write_text
from mrl.studies.run import describe_embeddings

pytest.importorskip("faiss")
from benchmarks import adaptive_search

DATA = DataConfig(name="digits", train_px=16, eval_resize_px=16, eval_px=16)
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def run(tmp_path):
    """A run on digits with the embeddings that eval.py leaves."""
    run = tmp_path / "run"
    run.mkdir()
    classes, dims = tuple("0123456789"), (8, 16, 32)
    model = build_model(build_backbone("vit_tiny_patch16_224", "scratch", 4, False, VIT), 10, dims).eval()
    info = ModelInfo("vit_tiny_patch16_224", VIT, 4, False, dims, False, classes, 16, 16, DATA.mean, DATA.std)
    save_model(model, info, run)
    config = Config(run=RunConfig(name="run"), data=DATA, head=HeadConfig(nesting_list=list(dims)))
    atomic_write_text(run / "config.yaml", to_yaml(config))
    process = distributed.start()
    images = build_data(DATA, 0, process.device)
    wanted = describe_embeddings(run, config, Source("digits", "run", 0, 16, 16, False), classes, [])
    for split in ("train", "val"):
        embed_split(run / "embeddings" / split, wanted[split], images[split], model.embed, 32, process, 256)
    return run


def lines_of(capsys, *argv):
    adaptive_search.main([*argv, "--shortlist_dims", "8", "--shortlist_sizes", "9", "60", "--repeats", "1"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_is_searched_by_every_contender(run, capsys):
    lines = lines_of(capsys, "--run", str(run), "--num_queries", "50")
    rows = [line for line in lines if line["measurement"] == "adaptive retrieval"]
    funnels = ["funnel [(32, 9)]", "funnel [(32, 60)]"]
    both = [f"{kind} at 8, {funnel}" for funnel in funnels for kind in ("faiss exact", "HNSW32")]
    assert [row["name"] for row in rows] == ["faiss full width", *both]
    sets = np.load(run / "embeddings/val/vectors.npy"), np.load(run / "embeddings/train/vectors.npy")
    queries, database = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in sets)
    some = np.linspace(0, len(queries) - 1, 50).astype(int)
    labels = [np.load(run / "embeddings" / split / "labels.npy") for split in ("val", "train")]
    nearest = (queries[some] @ database.T).argmax(axis=1)
    assert rows[0]["top_1"] == pytest.approx(100 * (labels[1][nearest] == labels[0][some]).mean())
    assert {(row["rows"], row["queries"], row["width"]) for row in rows} == {(len(database), 50, 32)}
    [fastest] = [line for line in lines if line["measurement"].startswith("fastest")]
    [named] = [row for row in rows if row["name"] == fastest["name"]]
    assert fastest["speed_vs_full_width"] == named["speed_vs_full_width"]


def test_the_fastest_is_chosen_by_some_queries_and_judged_by_the_others(monkeypatch, capsys):
    # Queries 0, 2, 4, 6 choose; row 0 of the database is right for all queries, row 1 for none.
    labels = np.array([5, 9])
    answers = {
        adaptive_search.FULL: [0, 0, 0, 1, 0, 1, 0, 1],
        "worse": [0, 0, 1, 0, 0, 0, 0, 0],
        "as good": [0, 0, 0, 0, 0, 1, 0, 0],
        "slow": [0, 0, 0, 0, 0, 0, 0, 0],
    }
    seconds = {adaptive_search.FULL: [4.0, 8.0], "worse": [0.1, 0.1], "as good": [1.0, 1.0], "slow": [2.0, 2.0]}
    timed = seconds, {name: np.array(rows)[:, None] for name, rows in answers.items()}
    monkeypatch.setattr(adaptive_search, "contenders_of", lambda *given: None)
    monkeypatch.setattr(adaptive_search, "take_turns", lambda contenders, repeats: timed)
    adaptive_search.measure((np.zeros((8, 3)), np.full(8, 5), np.zeros((2, 3)), labels), [2], [1], 2)
    *_, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (last["name"], last["speed_vs_full_width"], last["range"]) == ("as good", 6.0, [4.0, 8.0])
    assert (last["top_1_of_the_others"], last["full_width"]) == (75.0, 25.0)


def test_mirrored_images_double_the_database_and_are_embedded_once(run, capsys, monkeypatch):
    lines = lines_of(capsys, "--run", str(run), "--mirrored", "--num_queries", "5")
    train = np.load(run / "embeddings/train/labels.npy")
    assert {line["rows"] for line in lines if "rows" in line} == {2 * len(train)}
    folder = embeddings_path(run, "train", flip=True)
    np.testing.assert_array_equal(np.load(folder / "labels.npy"), train)
    images = build_data(DATA, 0, torch.device("cpu"), False, splits=("train",))["train"]
    [(batch, _)] = images.eval_batches([np.arange(7)])
    model = load(run)
    with torch.inference_mode():
        expected = model.embed(batch.flip(-1))
    np.testing.assert_allclose(np.load(folder / "vectors.npy")[:7], expected, atol=1e-5)

    def refuse(*args, **kwargs):
        raise AssertionError("images were embedded again")

    monkeypatch.setattr("mrl.retrieval.embeddings._embed_share", refuse)
    assert lines_of(capsys, "--run", str(run), "--mirrored", "--num_queries", "5")


def test_what_cannot_be_measured_is_refused(run, capsys):
    for option, wrong in (("--shortlist_dims", "32"), ("--shortlist_sizes", "1443")):
        argv = ["--run", str(run), "--shortlist_dims", "8", option, wrong]
        with pytest.raises(SystemExit, match=f"{option} .*{wrong}.* must be 1 to"):
            adaptive_search.main(argv)
    (run / "embeddings" / "train" / "metadata.json").unlink()
    with pytest.raises(SystemExit, match="run: python eval.py --runs"):
        adaptive_search.main(["--run", str(run)])
    with pytest.raises(SystemExit):
        adaptive_search.main(["--mirrored"])
    assert "--mirrored needs --run" in capsys.readouterr().err
