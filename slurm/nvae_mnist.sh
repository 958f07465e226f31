#!/usr/bin/env bash
# NVAE on dynamically binarized MNIST by the paper's recipe.
#
#   sbatch slurm/nvae_mnist.sh
#   slurm/submit.sh slurm/nvae_mnist.sh train.epochs=100
#
# See docs/slurm.md: more nodes, seeds, CPUs, what happens at the time limit.
#SBATCH --job-name=nvae_mnist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

recipe=nvae_mnist
# shellcheck source=slurm/launch.sh
source "${FROZEN_CODE:-.}/slurm/launch.sh" || { echo "error: submit from the repository's root, and keep .slurm" >&2; exit 2; }
train "$@"
