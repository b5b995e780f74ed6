"""Two processes under torchrun, one of which fails: both end, and what is shown is the error of that one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

import train
from mrl.data.listing import list_images
from mrl.data.order import train_rows
from mrl.errors import UserError
from mrl.training import distributed

REPOSITORY = Path(train.__file__).parent
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
WORDS = [
    *("--config", "digits_mrl.yaml", "--data.name", "folder", "--data.num_classes", "2", "--train.epochs", "1"),
    *("--model.backbone", "vit_tiny_patch16_224", "--model.kwargs", json.dumps(VIT), "--model.stem_stride", "4"),
    *("--data.batch_size", "4", "--optim.warmup_epochs", "0.5", "--train.precision", "fp32", "--data.num_workers", "1"),
]
# train.py, with less patience, and with an accident on process 1 after the second step if asked.
SCRIPT = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
import train
from mrl.training import distributed
from mrl.training.tracking import Tracker

distributed.SECONDS_TO_END = 1.5
steps = iter(range(2))

def advance(self):
    if next(steps, None) is None and os.environ["RANK"] == "1" and os.environ["ACCIDENT"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)

Tracker.advance = advance
sys.exit(train.main())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 16), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                write_png(torch.full((3, 32, 32), i, dtype=torch.uint8), str(root / split / name / f"{i}.png"))
    return root


def start_two(root, folder, accident=""):
    (folder / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    words = ["--data.root", str(root), "--run.dir", str(folder), "--run.name", "a"]
    return subprocess.run(
        [*torchrun, str(folder / "script.py"), *WORDS, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCIDENT": accident},
        timeout=120,
    )


def assert_process_1_failed(result):
    assert result.returncode != 0
    assert "[rank0]: Traceback" not in result.stderr, "the one that lost the other keeps its traceback to itself"
    root_cause = result.stderr.split("Root Cause")[1]
    assert "rank      : 1" in root_cause and "rank      : 0" not in root_cause
    return root_cause


def test_an_image_that_only_one_process_reads_and_cannot_ends_both_with_that_error(root, tmp_path):
    [of_main, of_other] = (train_rows(32, 4, 0, 0, rank, 2) for rank in (0, 1))
    path = Path(list_images(root, "train").paths[of_other[3][0]])
    assert of_other[3][0] not in [row for rows in of_main for row in rows]
    whole = path.read_bytes()
    path.write_bytes(b"no image")
    try:
        result = start_two(root, tmp_path)
    finally:
        path.write_bytes(whole)
    assert result.stderr.count(f"error: {path} cannot be read as an image") == 1
    assert "[rank1]: Traceback" not in result.stderr
    assert "exitcode  : 2" in assert_process_1_failed(result)


def test_a_process_that_is_killed_ends_the_other(root, tmp_path):
    assert "Signal 9 (SIGKILL)" in assert_process_1_failed(start_two(root, tmp_path, accident="kill"))


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
