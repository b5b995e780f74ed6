"""Two processes: their gradients, and what is left and shown when one of them fails."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch import nn

from mrl import distributed
from mrl.data.transforms import train_indices
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.model import build_backbone, build_model
from tests.test_train import REPOSITORY, TINY, TORCHRUN, make_folder, run  # noqa: F401

NUM_MICRO_BATCHES = 3
ARGV = [*TINY, "--data.name", "folder", "--data.num_classes", "2", "--train.epochs", "1", "--data.batch_size", "4"]


def fork_two(function, *arguments):
    """Run ``function(rank, *arguments)`` in two processes; return what they put on a queue, and their exit codes."""
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        torch.set_num_threads(1)
        torch.cuda.is_available = lambda: False
        function(rank, queue, *arguments)

    processes = [fork.Process(target=work, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    found = []
    while not queue.empty():
        found.append(queue.get())
    return found, [process.exitcode for process in processes]


def make_model_and_batches():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(2, NUM_MICRO_BATCHES, 2, 6)


def accumulate(rank, queue):
    process = distributed.start()
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
        queue.put((precision, reduced, [p.grad.tolist() for p in model.parameters()]))
    distributed.stop()


def test_gradients_are_averaged_once_per_step():
    found, _ = fork_two(accumulate)
    assert len(found) == 4
    model, batches = make_model_and_batches()
    model(batches.flatten(0, 2)).square().mean().backward()
    for precision, reduced, gradients in found:
        assert reduced == [False, False, True]
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            gradient = torch.tensor(gradient)
            if precision == "fp32":
                torch.testing.assert_close(gradient, parameter.grad)
            else:
                assert torch.equal(gradient, gradient.bfloat16().float())
                torch.testing.assert_close(gradient, parameter.grad, rtol=2**-6, atol=1e-3)
    first, second = (gradients for precision, _, gradients in found if precision == "bf16")
    assert first == second


def wait_long(rank, queue):
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=3)
    distributed.start()
    if rank == 1:  # it lists files
        time.sleep(4.5)
    agreed = distributed.agree(7), distributed.all_reduce_any(rank == 1)
    if rank == 0:
        try:
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
            distributed.barrier()
        except KeyboardInterrupt:
            agreed += ("interrupted",)
    else:
        time.sleep(2)
    queue.put((rank, agreed))
    queue.close()
    queue.join_thread()
    os._exit(0)


def test_processes_wait_for_one_that_lists_files_without_a_limit_and_react_to_ctrl_c():
    found, exit_codes = fork_two(wait_long)
    assert exit_codes == [0, 0]
    assert sorted(found) == [(0, (True, [True], "interrupted")), (1, (True, [True]))]


def fail(rank, queue, failure, log):
    distributed.SECONDS_TO_BE_ENDED = 0.1
    distributed.start()
    queue.put((rank, distributed.agree(7), distributed.agree(rank), distributed.all_reduce_any(rank == 1, False)))
    distributed.barrier()
    sys.stderr = log.with_name(f"stderr{rank}").open("w", buffering=1)
    if rank == 1 and failure == "kill":
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        if rank == 1:
            raise UserError("a broken image") if failure == "error" else KeyboardInterrupt
        while True:
            distributed.barrier()

    os._exit(distributed.run(work, "interrupted"))


@pytest.mark.parametrize(
    ("failure", "exit_code", "message"),
    [("kill", -signal.SIGKILL, ""), ("error", 2, "error: a broken image"), ("interrupt", 130, "interrupted")],
)
def test_a_process_that_waits_for_one_that_is_gone_ends_too(tmp_path, failure, exit_code, message):
    found, exit_codes = fork_two(fail, failure, tmp_path / "log")
    assert exit_codes == [2, exit_code]
    assert set(map(str, found)) == {"(0, True, False, [True, False])", "(1, True, False, [True, False])"}
    assert "error: lost the connection to another process (" in (tmp_path / "stderr0").read_text()
    assert (tmp_path / "stderr1").read_text().strip() == message


def test_an_image_that_only_one_process_cannot_read_ends_both_with_that_error(make_folder):  # noqa: F811
    root = make_folder(["cat", "dog"], 16, 2)
    [of_main, of_other] = (train_indices(32, 4, 0, 0, rank, 2) for rank in (0, 1))
    number = int(of_other[3][0])
    assert number not in [index for indices in of_main for index in indices]
    path = sorted((root / "train").rglob("*.png"))[number]
    path.write_bytes(b"no image")
    argv = [*ARGV, "--data.num_workers", "1", "--data.root", str(root), "--run.dir", str(root)]
    result = subprocess.run(
        [*TORCHRUN, "train.py", *argv],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=200,
    )
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


def test_a_bug_keeps_its_traceback():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        distributed.run(fail, "interrupted")


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
