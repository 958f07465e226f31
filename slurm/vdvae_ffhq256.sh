#!/usr/bin/env bash
# VDVAE on FFHQ 256x256 by the release's recipe: 32 GPUs.
#
#   sbatch slurm/vdvae_ffhq256.sh
#   slurm/submit.sh --nodes=8 --gpus-per-node=4 slurm/vdvae_ffhq256.sh
#   slurm/submit.sh --nodes=1 slurm/vdvae_ffhq256.sh train.micro_batch=8
#
# See docs/slurm.md: more nodes, seeds, CPUs, what happens at the time limit.
#SBATCH --job-name=vdvae_ffhq256
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

recipe=vdvae_ffhq256
# shellcheck source=slurm/launch.sh
source "${FROZEN_CODE:-.}/slurm/launch.sh" || { echo "error: submit from the repository's root, and keep .slurm" >&2; exit 2; }
train "$@"
