"""Benchmarks compare things that compute the same, and run on a machine without a GPU."""

import json
import time

import numpy as np
import pytest
import torch

from benchmarks import training_step
from benchmarks.authors_loop import build_authors_model, summed_losses
from benchmarks.timing import Timed
from mrl import distributed, nested_cross_entropy
from mrl.data import build_data
from mrl.model import build_backbone, build_model
from mrl.studies.run import embed_runs
from mrl.studies.transfer import TransferImages


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_authors_loop_sums_the_same_losses_of_the_same_model():
    dims = (8, 64, 512)
    ours = build_model(build_backbone("resnet10t", blurpool=True), 5, dims).eval()
    theirs = build_authors_model("resnet10t", dims, 5, blurpool=True).eval()
    state = {f"backbone.{key}".replace("backbone.fc", "head"): value for key, value in theirs.state_dict().items()}
    state = {key.replace(".conv.weight", ".weight"): value for key, value in state.items() if ".kernel" not in key}
    ours.load_state_dict(state)
    images, labels = torch.randn(3, 3, 64, 64), torch.tensor([0, 4, 2])
    expected = nested_cross_entropy(ours(images), labels, 0.1).sum()
    torch.testing.assert_close(summed_losses(theirs(images), labels), expected)


def test_the_training_step_benchmark_prints_a_row_for_every_contender(capsys, monkeypatch):
    def timed(steps, repeats, inner):  # each takes twice as long as the one before
        return {name: Timed([2.0**i], [0.0], step()) for i, (name, step) in enumerate(steps.items())}

    monkeypatch.setattr(training_step, "take_turns", timed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["--backbone", "test_resnet", "--px", "32", "--batch_sizes", "2", "4", "--num_classes", "5", "--blurpool"]
    training_step.main([*argv, "--repeats", "1", "--inner", "1", "--head_batch_size", "8"])
    rows = lines_of(capsys)
    names = ["plain", "MRL", "MRL-E", "plain timm", "authors' loop"]
    steps = [(row["batch_size"], row["name"]) for row in rows if row["measurement"] == "training step"]
    assert steps == [(size, name) for size in (2, 4) for name in names]
    assert [row["name"] for row in rows if row["measurement"] == "head + loss"] == names[:3]
    for row in rows:
        assert row["images_per_second"] > 0 and row["cpu"] and row["torch"]
        assert row["name"] != "plain" or row["speed_vs_plain"] == 1
    assert (rows[0]["speed_vs_authors"], rows[4]["speed_vs_plain"]) == (16, 0.062)


def test_a_batch_that_no_contender_can_hold_is_said_and_the_next_is_measured(capsys, monkeypatch):
    def full():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    def contenders(args, dims, images, *_):
        return dict.fromkeys(("plain", "MRL"), full if len(images) == 4 else lambda: lambda: time.sleep(0.001))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training_step, "contenders", contenders)
    argv = ["--backbone", "test_resnet", "--px", "32", "--batch_sizes", "4", "2", "--num_classes", "5"]
    training_step.main([*argv, "--repeats", "1", "--inner", "1", "--head_batch_size", "8"])
    printed = capsys.readouterr()
    assert printed.err.count("with batch size 4 in bf16 exceeds the GPU memory") == 2
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert {row["batch_size"] for row in rows if row["measurement"] == "training step"} == {2}


@pytest.mark.parametrize("folder", ["none", ""])
def test_a_folder_without_images_is_not_timed(folder, monkeypatch, tmp_path):
    from benchmarks import embed

    monkeypatch.setattr("sys.argv", ["embed", "--images", str(tmp_path / folder)])
    with pytest.raises(SystemExit, match=r"^error: --images .*: 0 images; a batch is 32$"):
        embed.main()


def test_the_searches_that_are_compared_find_the_same(monkeypatch, capsys):
    pytest.importorskip("faiss")
    from benchmarks import search

    sizes = "--rows 300 --width 32 --queries 9 --rerank_queries 20 --ks 3 --shortlist_size 40 --repeats 1"
    monkeypatch.setattr("sys.argv", ["search", *sizes.split()])
    search.main()
    rows = lines_of(capsys)
    same = [value for row in rows for key, value in row.items() if key.startswith("same_")]
    assert {row["measurement"] for row in rows} == {"3 sizes", "rerank"} and min(same) > 0.98


@pytest.fixture
def embedded_run(tmp_path, make_digits_run):
    """An untrained run on digits with the embeddings that eval.py leaves."""
    run = make_digits_run(tmp_path / "run", (8, 16, 32))
    embed_runs({"run": run}, TransferImages(), None, False, distributed.start())
    return run


def test_a_run_is_searched_by_every_index_and_dim(embedded_run, capsys):
    pytest.importorskip("faiss")
    from benchmarks import adaptive_search

    argv = ["--run", str(embedded_run), "--indexes", "Flat", "HNSW32", "IVF4,SQ8", "LSHrt", "--shortlist_dims", "8"]
    adaptive_search.main([*argv, "--shortlist_sizes", "9", "60", "--num_queries", "50", "--repeats", "1"])
    rows = [line for line in lines_of(capsys) if line["measurement"] == "adaptive retrieval"]
    each = [f"{name} at 8, best {n} at 32" for name in ("Flat", "HNSW32", "IVF4,SQ8", "LSHrt") for n in (9, 60)]
    assert [row["name"] for row in rows] == ["faiss full width", *each]
    of_split = {split: embedded_run / "embeddings" / split for split in ("train", "val")}
    database, queries = (np.load(of_split[split] / "vectors.npy") for split in ("train", "val"))
    some = np.linspace(0, len(queries) - 1, 50).round().astype(int)
    near = database.astype(np.float16).astype(np.float32)
    nearest = (queries[some] @ (near / np.linalg.norm(near, axis=1, keepdims=True)).T).argmax(axis=1)
    right = np.load(of_split["train"] / "labels.npy")[nearest] == np.load(of_split["val"] / "labels.npy")[some]
    assert rows[0]["top_1"] == pytest.approx(100 * right.mean())
    assert {(row["rows"], row["queries"], row["width"]) for row in rows} == {(len(database), 50, 32)}
    by_name = {row["name"]: row["bytes"] for row in rows}
    assert by_name["faiss full width"] == 128
    assert by_name["LSHrt at 8, best 9 at 32"] < by_name["Flat at 8, best 9 at 32"] == pytest.approx(32, abs=1)


def test_views_are_what_the_trained_layers_make_of_windows_of_the_frozen_layers_map(tmp_path):
    pytest.importorskip("faiss")
    import train
    from benchmarks.adaptive_search import embedded, views
    from mrl.studies.run import embed_runs, open_run
    from mrl.studies.transfer import TransferImages

    settings = "--config digits_mrl --model.backbone resnet10t --model.trainable [layer4] --train.cache_views 1"
    where = f"--run.dir {tmp_path} --run.name run --train.epochs 1 --head.nesting_list auto"
    assert train.main([*settings.split(), *where.split()]) == 0
    embed_runs({"run": tmp_path / "run"}, TransferImages([], [], [], {}), None, False, distributed.start())
    run = open_run(tmp_path / "run")
    found = views(run, 3).reshape(3, -1, run.model.width)
    np.testing.assert_allclose(found[0], run.train.vectors, rtol=2e-3, atol=2e-3)
    digits = build_data(run.config.data, 0, torch.device("cpu"))["train"]
    images = next(digits.eval_batches([np.arange(4)]))[0]
    taps = {}
    run.model.backbone.layer4.register_forward_pre_hook(lambda _, inputs: taps.update(map=inputs[0]))
    run.model.eval()
    with torch.no_grad():
        run.model.embed(images)
        side = taps["map"].shape[-1]
        expected = run.model.backbone.layer4(taps["map"][:, :, : side - 1, 1:]).mean(dim=(2, 3))
    np.testing.assert_allclose(found[2, :4], expected, rtol=2e-3, atol=2e-3)  # the second window that is smaller by one
    _, labels, database, database_labels = embedded(run, 3, 7)
    assert len(labels) == 7
    assert database.dtype == np.float16
    assert len(database) == len(database_labels) == 3 * len(run.train.labels)


def test_the_fastest_is_chosen_by_some_queries_and_judged_by_the_others(monkeypatch, capsys):
    pytest.importorskip("faiss")
    from benchmarks import adaptive_search

    # Queries 0, 2, 4, 6 choose; row 0 of the database is right for all queries, row 1 for none.
    timed = {
        adaptive_search.FULL: ([4.0, 8.0], [0, 0, 0, 1, 0, 1, 0, 1]),
        "worse": ([0.1, 0.1], [0, 0, 1, 0, 0, 0, 0, 0]),
        "as good": ([1.0, 1.0], [0, 0, 0, 0, 0, 1, 0, 0]),
        "slow": ([2.0, 2.0], [0, 0, 0, 0, 0, 0, 0, 0]),
    }
    timed = {name: Timed(seconds, seconds, np.array(found)[:, None]) for name, (seconds, found) in timed.items()}
    monkeypatch.setattr(adaptive_search, "contenders_of", lambda *given: (None, dict.fromkeys(timed, 1)))
    monkeypatch.setattr(adaptive_search, "take_turns", lambda contenders, repeats: timed)
    adaptive_search.measure(
        (np.zeros((8, 3)), np.full(8, 5), np.zeros((2, 3)), np.array([5, 9])), ["Flat"], [2], [1], 2
    )
    last = lines_of(capsys)[-1]
    assert (last["name"], last["speed_vs_full_width"], last["speed_vs_full_width_range"]) == (
        "as good",
        6.0,
        [4.0, 8.0],
    )
    assert (last["top_1_of_the_others"], last["full_width"]) == (75.0, 25.0)
