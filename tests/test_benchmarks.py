"""Benchmarks compare things that compute the same, and run on a machine without a GPU."""

import json

import pytest
import torch

from benchmarks import training_step
from benchmarks.authors_loop import build_authors_model, summed_losses
from mrl import nested_cross_entropy
from mrl.model import build_backbone, build_model


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["--backbone", "resnet10t", "--px", "32", "--batch_sizes", "2", "4", "--num_classes", "5", "--repeats", "1"]
    training_step.main([*argv, "--inner", "1", "--blurpool", "--head_batch_size", "8"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["plain", "MRL", "MRL-E", "plain timm", "authors' loop"]
    assert [(row["batch_size"], row["name"]) for row in rows if row["measurement"] == "training step"] == [
        *((2, name) for name in names),
        *((4, name) for name in names),
    ]
    assert [row["name"] for row in rows if row["measurement"] == "head + loss"] == names[:3]
    for row in rows:
        assert row["images_per_second"] > 0 and row["device"] and row["torch"] == torch.__version__
        assert row["name"] != "plain" or row["speed_vs_plain"] == 1
    assert rows[0]["speed_vs_authors"] == pytest.approx(1 / rows[4]["speed_vs_plain"], rel=0.01)
