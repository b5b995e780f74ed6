"""Two processes: their gradients, and what is left and shown when one of them fails."""

import os
import signal
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import nn

from mrl import distributed, embed
from mrl.data.transforms import train_indices
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.model import build_backbone, build_model
from tests.test_train import TINY, _on_the_cpu, fork_two, make_folder, run, torchrun_two  # noqa: F401

NUM_MICRO_BATCHES = 3
ARGV = [*TINY, "--data.name", "folder", "--data.num_classes", "2", "--train.epochs", "1", "--data.batch_size", "4"]


def make_model_and_batches():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(2, NUM_MICRO_BATCHES, 2, 6)


def accumulate(rank, folder):
    process = distributed.start()
    torch.version.cuda = None  # as in a build without CUDA
    found = []
    for precision in ("fp32", "bf16"):
        model, batches = make_model_and_batches()
        parallel = distributed.data_parallel(model, process, precision)
        reduced = []
        for micro_batch, images in enumerate(batches[rank]):
            with torch.profiler.profile() as profile:
                with distributed.no_sync(parallel, micro_batch < NUM_MICRO_BATCHES - 1):
                    (parallel(images).square().mean() / NUM_MICRO_BATCHES).backward()
                distributed.barrier()
            reduced.append(any("all_reduce" in event.name for event in profile.events()))
        found.append((precision, reduced, [p.grad for p in model.parameters()]))
    torch.save(found, folder / f"found{rank}.pt")


def test_gradients_are_averaged_once_per_step(tmp_path):
    assert fork_two(tmp_path, accumulate, tmp_path)[0] == [0, 0]
    model, batches = make_model_and_batches()
    model(batches.flatten(0, 2)).square().mean().backward()
    for rank in (0, 1):
        for precision, reduced, gradients in torch.load(tmp_path / f"found{rank}.pt"):
            assert reduced == [False, False, True]
            for gradient, parameter in zip(gradients, model.parameters(), strict=True):
                if precision == "fp32":
                    torch.testing.assert_close(gradient, parameter.grad)
                else:
                    assert torch.equal(gradient, gradient.bfloat16().float())
                    torch.testing.assert_close(gradient, parameter.grad, rtol=2**-6, atol=1e-3)


def wait_long(rank):
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=1)
    distributed.start()
    if rank == 1:  # it lists files
        time.sleep(2)
    assert distributed.agree(7) and distributed.all_reduce_any(rank == 1, False) == [True, False]
    assert not distributed.agree(rank)
    if rank == 0:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        return distributed.run(distributed.barrier, "interrupted")
    time.sleep(1.5)
    return 0


def test_processes_wait_for_one_that_lists_files_without_a_limit_and_react_to_ctrl_c(tmp_path):
    assert fork_two(tmp_path, wait_long)[0] == [130, 0]


def fail(rank, failure):
    distributed.SECONDS_TO_BE_ENDED = 0.1
    distributed.start()
    distributed.barrier()
    if rank == 1 and failure == "kill":
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        if rank == 1:
            raise UserError("a broken image") if failure == "error" else KeyboardInterrupt
        while True:
            distributed.barrier()

    return distributed.run(work, "interrupted")


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [("kill", -signal.SIGKILL, ""), ("error", 2, "error: a broken image"), ("interrupt", 130, "interrupted")],
)
def test_a_process_that_waits_for_one_that_is_gone_ends_too(tmp_path, failure, status, message):
    statuses, (waiting, failing) = fork_two(tmp_path, fail, failure)
    assert statuses == [2, status]
    assert "error: lost the connection to another process (" in waiting
    assert failing.strip() == message


def test_the_last_line_of_an_error_of_nccl_is_shown_and_its_groups_are_not_left_in_order(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "SECONDS_TO_BE_ENDED", 0)
    monkeypatch.setattr(distributed, "stop", lambda: pytest.fail("NCCL would wait here for processes that wait"))

    def fail():
        raise torch.distributed.DistBackendError("NCCL error in: a.cpp\nLast error:\nDuplicate GPU detected")

    assert distributed.run(fail, "interrupted") == 2
    assert "(NCCL error in: a.cpp Last error: Duplicate GPU detected); see its error" in capsys.readouterr().err


def test_one_variable_of_torchrun_alone_starts_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.start().world_size == 1


def test_an_error_about_an_igloo_is_not_a_lost_connection(capsys):
    def fail():
        raise UserError("igloo/1.jpg cannot be read as an image")

    assert distributed.run(fail, "interrupted") == 2
    assert capsys.readouterr().err.strip() == "error: igloo/1.jpg cannot be read as an image"


def test_an_image_that_only_one_process_cannot_read_ends_both_with_that_error(make_folder):  # noqa: F811
    root = make_folder(["cat", "dog"], 16, 2)
    [of_main, of_other] = (train_indices(32, 4, 0, 0, rank, 2) for rank in (0, 1))
    number = int(of_other[3][0])
    assert number not in [index for indices in of_main for index in indices]
    path = sorted((root / "train").rglob("*.png"))[number]
    path.write_bytes(b"no image")
    result = torchrun_two(root, *ARGV, "--data.num_workers", "1", "--data.root", str(root))
    assert result.returncode != 0
    assert result.stderr.count(f"error: {path} cannot be read as an image") == 1
    assert "[rank" not in result.stderr, "no traceback, neither of the one that failed nor of the one that lost it"
    root_cause = result.stderr.split("Root Cause")[1]
    assert "rank      : 1" in root_cause and "exitcode  : 2" in root_cause
    assert f"error: {path} cannot be read as an image" in root_cause


@pytest.mark.parametrize("local_rank", [None, 0, 3])
def test_torchrun_shows_the_error_of_all_but_the_first_process_of_a_machine(tmp_path, monkeypatch, capsys, local_rank):
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def fail():
        raise UserError("mine")

    assert distributed.run(fail, "interrupted") == 2
    assert capsys.readouterr().err == ("" if local_rank == 3 else "\nerror: mine\n")
    assert (tmp_path / "error.json").exists() == (local_rank is not None)


def test_two_processes_embed_a_folder_as_one_does_and_one_of_them_tells(saved_run, pictures, tmp_path):
    argv = ["--run", str(saved_run), "--images", str(pictures.folder), "--num_workers", "0", "--out"]
    assert embed.main([*argv, str(tmp_path / "one.npy")]) == 0
    for name, told in (("a", "7 images x 96 dims"), ("b", "already holds the vectors")):
        (tmp_path / name).mkdir()
        statuses, logs = fork_two(tmp_path / name, lambda rank: embed.main([*argv, str(tmp_path / "two.npy")]))
        assert statuses == [0, 0] and sum(told in log for log in logs) == 1
    np.testing.assert_allclose(*(np.load(tmp_path / f"{name}.npy") for name in ("one", "two")), atol=1e-6)


def test_unusable_data_leaves_no_run_directory(make_folder, capsys):  # noqa: F811
    root = make_folder(["cat", "dog"], 16, 2)
    for argv in (["--data.root", str(root / "none")], ["--data.root", str(root), "--data.num_classes", "3"]):
        assert run(root / "runs", *ARGV, *argv) == 2
        assert capsys.readouterr().err.strip().startswith("error: data.")
        assert not (root / "runs").exists()


def test_sync_batchnorm_keeps_weights_names_and_activations():
    """timm's BatchNorms of an EfficientNet hold its activations."""
    model = build_model(build_backbone("efficientnet_b0"), 5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    images = torch.randn(2, 3, 32, 32)
    before, names = model(images), list(model.state_dict())
    assert distributed.sync_batchnorm(model, Process(0, 1, torch.device("cuda", 0))) is model
    with pytest.raises(UserError, match=r"train\.sync_batchnorm is true, but it needs GPUs"):
        distributed.sync_batchnorm(model, Process(0, 2, torch.device("cpu")))
    changed = distributed.sync_batchnorm(model, Process(0, 2, torch.device("cuda", 0)))
    norms = [module for module in changed.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 49 and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert list(changed.state_dict()) == names
    torch.testing.assert_close(changed(images), before)
