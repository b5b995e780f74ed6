"""Two processes, one of which fails: both end, and what is shown is the error of that one."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

import train
from mrl import distributed
from mrl.data.folder import list_images
from mrl.data.transforms import train_indices
from mrl.errors import UserError

REPOSITORY = Path(train.__file__).parent
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
WORDS = [
    *("--config", "digits_mrl.yaml", "--data.name", "folder", "--data.num_classes", "2", "--train.epochs", "1"),
    *("--model.backbone", "vit_tiny_patch16_224", "--model.kwargs", json.dumps(VIT), "--model.stem_stride", "4"),
    *("--data.batch_size", "4", "--optim.warmup_epochs", "0.5", "--train.precision", "fp32", "--data.num_workers", "1"),
]
# train.py, with less patience.
SCRIPT = """
import os, sys
sys.path.insert(0, os.getcwd())
import train
from mrl import distributed

distributed.SECONDS_TO_END = 1.5
sys.exit(train.main())
"""


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "images"
    for split, count in (("train", 16), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                write_png(torch.full((3, 32, 32), i, dtype=torch.uint8), str(root / split / name / f"{i}.png"))
    return root


def test_an_image_that_only_one_process_reads_and_cannot_ends_both_with_that_error(root, tmp_path):
    [of_main, of_other] = (train_indices(32, 4, 0, 0, rank, 2) for rank in (0, 1))
    path = Path(list_images(root, "train").paths[of_other[3][0]])
    assert of_other[3][0] not in [row for rows in of_main for row in rows]
    path.write_bytes(b"no image")
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    words = ["--data.root", str(root), "--run.dir", str(tmp_path), "--run.name", "a"]
    result = subprocess.run(
        [*torchrun, str(tmp_path / "script.py"), *WORDS, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
    )
    assert result.returncode != 0
    assert result.stderr.count(f"error: {path} cannot be read as an image") == 1
    assert "[rank" not in result.stderr, "no traceback, neither of the one that failed nor of the one that lost it"
    root_cause = result.stderr.split("Root Cause")[1]
    assert "rank      : 1" in root_cause and "exitcode  : 2" in root_cause


def meet_an_accident(rank, port, accident, told, log):
    """What each of two processes does: both join, one fails and the other waits for it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    distributed.SECONDS_TO_END = 0.1
    distributed.start()
    told.put((rank, distributed.agree(7), distributed.agree(rank)))
    with distributed.local_main_first(), log.open("a") as file:
        time.sleep(0.2 * (rank == 0))
        file.write(f"{rank}")
    distributed.barrier()
    if rank == 1 and accident == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with distributed.failing_together():
            if rank == 1:
                raise RuntimeError("something unforeseen")
            for _ in range(100):
                distributed.barrier()
    except Exception as error:
        told.put((rank, type(error), str(error)))


@pytest.mark.parametrize("accident", ["kill", "error"])
def test_who_waits_for_a_process_that_is_gone_ends_too(tmp_path, accident):
    fork = multiprocessing.get_context("fork")
    told = fork.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, accident, told, tmp_path / "log")
    processes = [fork.Process(target=meet_an_accident, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = [told.get(timeout=60) for _ in range(3 if accident == "kill" else 4)]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL if accident == "kill" else 0]
    assert {(0, True, False), (1, True, False)} <= set(found), "they agree on 7, and not on their ranks"
    assert (tmp_path / "log").read_text() == "01"
    [(_, kind, message)] = [row for row in found if row[0] == 0 and row[1] is not True]
    assert kind is distributed.ElsewhereError and "another process has ended" in message
    if accident == "error":
        assert (1, RuntimeError, "something unforeseen") in found


@pytest.fixture
def naps(monkeypatch):
    found = []
    monkeypatch.setattr(distributed.time, "sleep", found.append)
    return found


@pytest.mark.parametrize(
    ("error", "local_rank", "patience"),
    [
        (UserError("mine"), 0, 0),
        (UserError("mine"), 3, 1),
        (RuntimeError("a bug"), 3, 1),
        (distributed.ElsewhereError("of another"), 0, 2),
        (distributed.ElsewhereError("of another"), 1, 3),
    ],
)
def test_the_first_process_of_a_machine_speaks_first_and_an_own_error_before_anothers(
    naps, monkeypatch, error, local_rank, patience
):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(type(error)) as raised, distributed.failing_together():
        raise error
    assert raised.value is error
    assert naps == [patience * distributed.SECONDS_TO_END]


def test_a_lost_connection_is_told_as_such(naps, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:1] Connection closed by peer [10.0.0.1]:2. Look at the logs.")
    message = r"another process has ended or cannot be reached \(Connection closed by peer \[10.0.0.1\]:2\)"
    with pytest.raises(distributed.ElsewhereError, match=message), distributed.failing_together():
        raise lost


def test_one_process_alone_fails_at_once(naps, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError), distributed.failing_together():
        raise UserError("mine")
    assert naps == []


def test_data_that_cannot_be_used_leave_no_run_directory(root, tmp_path, capsys):
    for words in (["--data.root", str(tmp_path / "none")], ["--data.root", str(root), "--data.batch_size", "33"]):
        assert train.main([*WORDS, *words, "--run.dir", str(tmp_path / "runs"), "--run.name", "a"]) == 2
        assert capsys.readouterr().err.strip().startswith("error: data.")
        assert not (tmp_path / "runs").exists()
