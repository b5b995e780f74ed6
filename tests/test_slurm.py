"""docs/slurm.sh, with stand-ins for SLURM's commands."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "slurm.sh"


def test_the_machines_of_a_job_meet_at_the_first_and_words_arrive_whole(tmp_path):
    for name, program in (("scontrol", "printf 'node7\\nnode9\\n'"), ("srun", "printf '%s\\n' \"$@\"; exit 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    job = {"NODELIST": "node[7,9]", "NUM_NODES": "2", "ID": "41"}
    environment = {f"SLURM_JOB_{key}": value for key, value in job.items()} | {"SLURM_CPUS_PER_TASK": "64"}
    result = subprocess.run(
        ["bash", str(SCRIPT), "--config", "a.yaml", "--model.kwargs", '{"a": 1, "b": 2}'],
        env={**environment, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 3, "a job fails as its processes do"
    words = result.stdout.splitlines()
    assert {"--nnodes=2", "--rdzv_id=41", "--rdzv_endpoint=node7:29500", "--cpus-per-task=64"} <= set(words)
    after = words[words.index("train.py") :]
    assert after == ["train.py", "--run.resume", "auto", "--config", "a.yaml", "--model.kwargs", '{"a": 1, "b": 2}']


def test_it_is_for_sbatch_only():
    result = subprocess.run(["bash", str(SCRIPT)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert result.returncode != 0 and "submit this script with sbatch" in result.stderr
