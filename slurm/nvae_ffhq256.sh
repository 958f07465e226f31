#!/usr/bin/env bash
# NVAE on FFHQ 256x256 by the paper's recipe: 24 GPUs of 40 GB; of 32 GB with train.recompute=norms.
#
#   sbatch slurm/nvae_ffhq256.sh
#   slurm/submit.sh --nodes=6 --gpus-per-node=4 slurm/nvae_ffhq256.sh
#   slurm/submit.sh --nodes=1 slurm/nvae_ffhq256.sh train.micro_batch=32 train.recompute=norms
#
# See docs/slurm.md: more nodes, seeds, CPUs, what happens at the time limit.
#SBATCH --job-name=nvae_ffhq256
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

recipe=nvae_ffhq256
# shellcheck source=slurm/launch.sh
source "${FROZEN_CODE:-.}/slurm/launch.sh" || { echo "error: submit from the repository's root, and keep .slurm" >&2; exit 2; }
train "$@"
