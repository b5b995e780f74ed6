"""The loop on a GPU: what the CPU tests cannot see."""

import signal

import pytest
import torch

import mrl
from tests.test_train import EVERYTHING, rows, run, stop_after  # noqa: F401

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_training_on_the_gpu_learns_and_resumes(tmp_path, stop_after, monkeypatch, precision, compiled):  # noqa: F811
    words = [*EVERYTHING, "--train.precision", precision, "--train.compile", compiled]
    stop_after(3)
    assert run(tmp_path, *words) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert run(tmp_path, *words, "--run.resume", "auto") == 0
    losses = [row["loss/512"] for row in rows(tmp_path) if "loss/512" in row]
    assert losses[-1] < losses[0]
    vectors = mrl.load(tmp_path / "a").to("cuda").encode(torch.zeros(2, 3, 32, 32, device="cuda"), dim=8)
    assert vectors.norm(dim=1).cpu() == pytest.approx([1.0, 1.0], abs=1e-5)
