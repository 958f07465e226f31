#!/usr/bin/env bash
# Any model by its default recipe, or a recipe file of your own. The first argument names it.
#
#   sbatch slurm/baselines.sh conv_vae
#   slurm/submit.sh slurm/baselines.sh my_recipe.yaml optim.lr=1e-3
#
# See docs/slurm.md: more nodes, seeds, CPUs, what happens at the time limit.
#SBATCH --job-name=baselines
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

recipe=${1:-}
[ -n "$recipe" ] || { echo "error: name a recipe, or a recipe file: slurm/baselines.sh conv_vae" >&2; exit 2; }
shift
# shellcheck source=slurm/launch.sh
source "${FROZEN_CODE:-.}/slurm/launch.sh" || { echo "error: submit from the repository's root, and keep .slurm" >&2; exit 2; }
train "$@"
