"""The loop on a GPU: what the CPU tests cannot see."""

import gzip

import pytest
import torch

import mrl
from tests.test_train import EVERYTHING, rows, run, run_until, torchrun_two

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_training_on_the_gpu_learns_and_resumes(tmp_path, precision, compiled):
    argv = [*EVERYTHING, "--train.precision", precision, "--train.compile", compiled]
    run_until(3, tmp_path, *argv)
    assert run(tmp_path, *argv, "--run.resume", "auto") == 0
    losses = [row["loss/64"] for row in rows(tmp_path) if "loss/64" in row]
    assert losses[-1] < losses[0]
    vectors = mrl.load(tmp_path / "a").to("cuda").encode(torch.zeros(2, 3, 32, 32, device="cuda"), dim=8)
    assert vectors.norm(dim=1).cpu() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_a_profile_shows_the_gpus_time_and_its_trace_holds_kernels(tmp_path, capsys):
    assert run(tmp_path, *EVERYTHING, "--train.profile_steps", "3") == 0
    printed = capsys.readouterr().out
    assert "CUDA total" in printed and "forward" in printed
    assert b'"cat": "kernel"' in gzip.decompress((tmp_path / "a" / "trace.json.gz").read_bytes())


def test_a_full_gpu_ends_the_run_with_advice(tmp_path, capsys):
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 32 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert run(tmp_path, *EVERYTHING) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: a GPU ran out of memory") and "--train.accumulation_steps" in error


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_with_one_batchnorm_and_bf16_gradients(tmp_path):
    argv = [*EVERYTHING, "--train.sync_batchnorm", "true", "--train.gradient_precision", "bf16"]
    assert torchrun_two(tmp_path, *argv).returncode == 0
    losses = [row["loss/64"] for row in rows(tmp_path) if "loss/64" in row]
    assert losses[-1] < losses[0]
