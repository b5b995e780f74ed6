"""The benchmark of adaptive retrieval, on the embeddings of a small model that was never trained."""

import json

import numpy as np
import pytest
import torch

from mrl.backbones import build_backbone
from mrl.config import Config, DataConfig, HeadConfig, RunConfig
from mrl.data import build_data
from mrl.files import write_text
from mrl.models import ModelInfo, build_model, save_model
from mrl.recipes import to_yaml
from mrl.results import Source
from mrl.retrieval.embeddings import embed_split, embeddings_path
from mrl.studies.embed_runs import describe_embeddings
from mrl.training import distributed

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
    write_text(run / "config.yaml", to_yaml(config))
    process = distributed.start()
    images = build_data(DATA, 0, process.device)
    wanted = describe_embeddings(run, config, Source("digits", "run", 0, 16, 16, False), classes, [])
    for split in ("train", "val"):
        embed_split(run / "embeddings" / split, wanted[split], images[split], model.embed, 32, process, 256)
    return run


def lines_of(capsys, *words):
    adaptive_search.main([*words, "--shortlist_dims", "8", "--shortlist_sizes", "9", "60", "--repeats", "1"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_is_searched_by_every_contender(run, capsys):
    lines = lines_of(capsys, "--run", str(run), "--num_queries", "50")
    rows = [line for line in lines if line["measurement"] == "adaptive retrieval"]
    funnels = ["funnel [(32, 9)]", "funnel [(32, 60), (32, 50)]"]
    both = [f"{kind} at 8, {funnel}" for funnel in funnels for kind in ("faiss exact", "HNSW32")]
    assert [row["name"] for row in rows] == ["faiss full width", *both]
    sets = np.load(run / "embeddings/val/vectors.npy"), np.load(run / "embeddings/train/vectors.npy")
    queries, database = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in sets)
    some = np.linspace(0, len(queries) - 1, 50).astype(int)
    labels = [np.load(run / "embeddings" / split / "labels.npy") for split in ("val", "train")]
    nearest = (queries[some] @ database.T).argmax(axis=1)
    assert rows[0]["top_1"] == pytest.approx((labels[1][nearest] == labels[0][some]).mean(), abs=1e-5)
    assert {(row["rows"], row["queries"], row["width"]) for row in rows} == {(len(database), 50, 32)}
    [fastest] = [line for line in lines if line["measurement"] == "fastest at equal top-1"]
    as_good = [row for row in rows if row["top_1"] >= rows[0]["top_1"] - 0.001]
    assert fastest["speed_vs_full_width"] == max(row["speed_vs_full_width"] for row in as_good)


def test_mirrored_images_double_the_database_and_are_embedded_once(run, capsys, monkeypatch):
    lines = lines_of(capsys, "--run", str(run), "--mirrored", "--num_queries", "5")
    train = np.load(run / "embeddings/train/labels.npy")
    assert {line["rows"] for line in lines if "rows" in line} == {2 * len(train)}
    folder = embeddings_path(run, "train", flip=True)
    np.testing.assert_array_equal(np.load(folder / "labels.npy"), train)
    images = build_data(DATA, 0, torch.device("cpu"), False, splits=("train",))["train"]
    [(batch, _)] = images.eval_batches([np.arange(7)])
    model = adaptive_search.load(run)
    with torch.inference_mode():
        expected = model.embed(batch.flip(-1))
    np.testing.assert_allclose(np.load(folder / "vectors.npy")[:7], expected, atol=1e-5)

    def refuse(*args, **kwargs):
        raise AssertionError("images were embedded again")

    monkeypatch.setattr("mrl.retrieval.embeddings._fill", refuse)
    assert lines_of(capsys, "--run", str(run), "--mirrored", "--num_queries", "5")


def test_a_run_without_embeddings_and_mirrors_without_a_run_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"holds no finished embeddings; first run: python eval.py --runs"):
        adaptive_search.main(["--run", str(tmp_path)])
    with pytest.raises(SystemExit):
        adaptive_search.main(["--mirrored"])
    assert "--mirrored needs --run" in capsys.readouterr().err
