"""docs/slurm.sh, with stand-ins for SLURM's commands."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "slurm.sh"


def test_the_machines_of_a_job_meet_at_the_first_and_arguments_arrive_whole(tmp_path):
    for name, program in (("scontrol", "printf 'node7\\nnode9\\n'"), ("srun", "printf '%s\\n' \"$@\"; exit 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    given = ["--config", "a.yaml", "--model.kwargs", '{"a": 1, "b": 2}']
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment |= {"SLURM_JOB_NODELIST": "node[7,9]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "41"}
    environment |= {"SLURM_CPUS_PER_TASK": "64"}
    result = subprocess.run(["bash", str(SCRIPT), *given], env=environment, capture_output=True, text=True)
    assert result.returncode == 3, "a job fails as its processes do"
    argv = result.stdout.splitlines()
    assert {"--nnodes=2", "--rdzv_id=41", "--rdzv_endpoint=node7:29500", "--cpus-per-task=64"} <= set(argv)
    assert argv[argv.index("train.py") :] == ["train.py", "--run.resume", "auto", *given]
