#!/usr/bin/env bash
# NVAE on CelebA 64x64 by the paper's recipe, one `accelerate launch` per node.
#
#   sbatch slurm/nvae_celeba.sh                                  # as below: 1 node, 8 GPUs
#   sbatch --nodes=2 slurm/nvae_celeba.sh                        # more nodes
#   sbatch slurm/nvae_celeba.sh train.steps=1000                 # settings go to train.py
#
# Submit from the repository's root, with the environment of `make` in .venv and the shards in data/celeba64. The same command
# again continues the run from its last checkpoint. Without GPUs (trying it out): PROCESSES_PER_NODE=2 sbatch --gpus-per-node=0 ...
#SBATCH --job-name=nvae_celeba
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

data=${DATA:-data/celeba64}
if [ ! -f "$data/manifest.json" ]; then
    echo "error: $data holds no complete shard set; make it with:" >&2
    echo "  python -m shard_data celeba --source DIR --out $data --size 64" >&2
    exit 2
fi

processes_per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export num_processes=$((SLURM_JOB_NUM_NODES * processes_per_node))
main_process_ip=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export main_process_ip
export main_process_port=$((20000 + SLURM_JOB_ID % 10000))   # two jobs on one node do not meet
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}          # srun does not inherit it
# Where node names resolve to loopback, set the interface: GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (GPU).

# $SLURM_NODEID differs per task, so it is the task's shell that must expand it.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec .venv/bin/accelerate launch \
    --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$num_processes" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$main_process_ip" --main_process_port "$main_process_port" \
    pipeline/train.py "$@"' launch \
    --config pipeline/configs/nvae_celeba64.yaml --data "$data" train.expect_processes="$num_processes" "$@"
