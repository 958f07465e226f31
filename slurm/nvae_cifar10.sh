#!/usr/bin/env bash
# NVAE on CIFAR-10 by the paper's recipe.
#
#   sbatch slurm/nvae_cifar10.sh
#   slurm/submit.sh --nodes=2 slurm/nvae_cifar10.sh train.steps=1000
#
# See docs/slurm.md: more nodes, seeds, CPUs, what happens at the time limit.
#SBATCH --job-name=nvae_cifar10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

recipe=nvae_cifar10
# shellcheck source=slurm/launch.sh
source "${FROZEN_CODE:-.}/slurm/launch.sh" || { echo "error: submit from the repository's root, and keep .slurm" >&2; exit 2; }
train "$@"
