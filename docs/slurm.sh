#!/usr/bin/env bash
# Train on several machines under SLURM. What follows the script's name goes to train.py:
#
#   sbatch docs/slurm.sh --config resnet50_mrl.yaml --data.root /datasets/imagenet --run.dir /shared/runs
#
# A run that is longer than one job may last: submit the same line several times with --dependency=singleton.
# Each job goes on where the one before stopped; one that finds the run finished ends at once.
#
#SBATCH --job-name=mrl
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -euo pipefail

# One task per machine is torchrun, which starts one process per GPU. TERM comes 120 s before the time is up: the run
# saves a checkpoint and ends.
cd "${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}"
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

export TORCH_CPP_LOG_LEVEL=ERROR # else torchrun prints stack traces of its own when another machine has ended
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${PROCESSES_PER_MACHINE:-gpu}" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="${machines[0]}:${PORT:-29500}" \
    train.py --run.resume auto "$@"
