#!/usr/bin/env bash
# Makes a shard set; resumes an interrupted one. Takes the arguments of `python -m shard_data`.
#
#   sbatch slurm/shard_data.sh celeba --size 64 --source ~/celeba --out data/celeba64
#
# See docs/slurm.md: more nodes, seeds, CPUs, what happens at the time limit.
#SBATCH --job-name=shard_data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# shellcheck source=slurm/launch.sh
source "${FROZEN_CODE:-.}/slurm/launch.sh" || { echo "error: submit from the repository's root, and keep .slurm" >&2; exit 2; }
make_shards "$@"
