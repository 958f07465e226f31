#!/usr/bin/env bash
# What srun starts once on every node: pipeline/launch.py, which starts the node's processes as `accelerate launch` does.
#
#   slurm/node.sh SCRIPT ARGUMENT...
#
# SLURM sends USR1 to every process of a step. It would end the launcher and its processes, so it is ignored here;
# exec keeps that, and the script's own processes set a handler.
set -euo pipefail
trap '' USR1
# Without GPUs, training refuses the configuration below unless CPUs are requested.
if [ -z "${SLURM_GPUS_ON_NODE:-}" ]; then export ACCELERATE_USE_CPU=true; fi
exec "$PYTHON" "$FROZEN_CODE/pipeline/launch.py" \
    --config_file "$FROZEN_CODE/accelerate_configs/multi_node.yaml" \
    --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" --num_processes "$NUM_PROCESSES" \
    --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" \
    --num_cpu_threads_per_process "$OMP_NUM_THREADS" "$@"
