#!/bin/bash
# Two nodes of eight GPUs: sbatch docs/slurm.sh, from the repository's folder, which all nodes must see (as data/ and out/).
#SBATCH --job-name=sparse-gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
# SIGTERM, three minutes before the time is up: the run saves and ends; the same job, submitted again, goes on from there.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150  # else torchrun kills after 30 seconds, perhaps within a step or an evaluation
export HF_HOME="$PWD/data/huggingface"  # process 0 downloads, all nodes read
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_endpoint="$first:29500" train.py "${@:-config/gpt2.py}"
