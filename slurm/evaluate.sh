#!/usr/bin/env bash
# Evaluates a run on held-out images. Takes the arguments of pipeline/evaluate.py.
#
#   sbatch slurm/evaluate.sh runs/nvae_celeba64 --data data/celeba64 --split test --importance-samples 1000
#   slurm/submit.sh --gpus-per-node=8 slurm/evaluate.sh runs/nvae_celeba64 --data data/celeba64 --split test
#
# See docs/slurm.md: more nodes, seeds, CPUs, what happens at the time limit.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# shellcheck source=slurm/launch.sh
source "${FROZEN_CODE:-.}/slurm/launch.sh" || { echo "error: submit from the repository's root, and keep .slurm" >&2; exit 2; }
evaluate "$@"
