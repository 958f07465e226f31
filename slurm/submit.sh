#!/usr/bin/env bash
# sbatch with a copy of the current code. Checks the settings, and that the shards exist, before the job is queued.
#
#   slurm/submit.sh [options of sbatch] slurm/SCRIPT.sh [arguments of the script]
set -euo pipefail
cd "$(dirname "$0")/.."

options=()
while [ $# -gt 0 ] && [[ $1 != *.sh ]]; do
    case $1 in
        -d* | --dependency*) export SHARDS_LATER=1 ;; # the job it depends on may make them
    esac
    options+=("$1")
    shift
done
script=slurm/$(basename "${1:-}")
if [ $# = 0 ]; then
    sed -n '2,4s/^# \{0,1\}//p' slurm/submit.sh >&2
    exit 2
fi
[ -f "$script" ] || { echo "error: there is no $script; slurm/baselines.sh RECIPE trains any recipe" >&2; exit 2; }
shift

source slurm/site.sh
FROZEN_CODE=$(SUBMITTING=1 bash slurm/freeze.sh "$@")
export FROZEN_CODE
SUBMITTING=1 bash "$FROZEN_CODE/$script" "$@"
unset SHARDS_LATER
exec sbatch "${options[@]}" "$FROZEN_CODE/$script" "$@"
