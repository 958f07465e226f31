# shellcheck shell=bash
# What differs from site to site; the one file here to edit. slurm/submit.sh reads it on the host that submits, each job
# reads it on its first node. NAME=${NAME:-value} keeps a NAME that the submitting shell has exported.

# Environment: a python that has the project's packages (`make` makes .venv), and the modules it needs.
# module purge
# module load gcc cuda
PYTHON=${PYTHON:-.venv/bin/python}

# Account and partition, as slurm/submit.sh hands them to sbatch. Plain sbatch reads no file: give options there, or put
# these lines into ~/.bashrc.
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu

# Network: needed where node names resolve to loopback, or where the fast network is not the first one.
# export NCCL_SOCKET_IFNAME=ib0   # GPUs
# export GLOO_SOCKET_IFNAME=ib0   # CPUs, and host memory in GPU jobs
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN

# W&B: `wandb login` once gives all jobs a key, and this arranges the page of their project (docs/tracking.md):
#   python -m pipeline.tracking.dashboard --project nvae-pipeline
# export WANDB_BASE_URL=https://wandb.example.org   # a server of your own

# Folders. RUNS: run folders. STAGE: a folder on each node's own disk, the same path on all of them and
# kept between jobs; shards are copied there and checked before training. Empty: shards are read in place.
RUNS=${RUNS:-runs}
STAGE=${STAGE:-}

# How often a job is requeued: all starts, and failed ones in a row without progress.
MAX_ATTEMPTS=${MAX_ATTEMPTS:-100}
MAX_FAILURES=${MAX_FAILURES:-5}
