#!/usr/bin/env bash
# VDVAE on CIFAR-10 by the release's recipe: 2 GPUs.
#
#   sbatch slurm/vdvae_cifar10.sh
#   slurm/submit.sh --gpus-per-node=8 slurm/vdvae_cifar10.sh
#   slurm/submit.sh --array=1-4 slurm/vdvae_cifar10.sh
#
# See docs/slurm.md: more nodes, seeds, CPUs, what happens at the time limit.
#SBATCH --job-name=vdvae_cifar10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

recipe=vdvae_cifar10
# shellcheck source=slurm/launch.sh
source "${FROZEN_CODE:-.}/slurm/launch.sh" || { echo "error: submit from the repository's root, and keep .slurm" >&2; exit 2; }
train "$@"
