# shellcheck shell=bash
# The launcher that all scripts of this folder share. A script sets its variables, sources this file and calls `train`,
# `evaluate` or `make_shards` with its arguments. docs/slurm.md is the user's guide.
#
# slurm/submit.sh calls a script first on the host that submits (SUBMITTING=1: check and stop), then SLURM does on the
# job's first node. Exit codes: 0 done, or requeued; 2 user error; 75 unfinished and not requeued; others: the program's.
set -euo pipefail
shopt -s inherit_errexit

# The time limit is near (--signal in the scripts' headers), or the job is preempted. Recorded from the first line on.
stopping=${stopping:-}
trap 'stopping=1; echo "$(date "+%F %T") received USR1, stopping" >&2' USR1

# In a job that plain sbatch submitted, continue with the copy of the code that its first start made.
if [ -z "${FROZEN_CODE:-}" ]; then
    FROZEN_CODE=$(bash slurm/freeze.sh "${recipe:-}" "$@") || exit
    export FROZEN_CODE
    # shellcheck source=slurm/launch.sh
    source "$FROZEN_CODE/slurm/launch.sh"
    return
fi

# shellcheck source=slurm/site.sh
source "$FROZEN_CODE/slurm/site.sh"
export PYTHON PYTHONPATH=$FROZEN_CODE PYTHONFAULTHANDLER=1
# What torch.compile makes (train.compile), on a disk that all nodes read: a requeued job does not compile again.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.slurm/torchinductor}

say() { echo "$(date '+%F %T') $*" >&2; }
die() { echo "error: $*" >&2; exit 2; }

# An array's task is named by array and index: one task has the job id of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-${SLURM_JOB_ID:-}}
attempt=${SLURM_RESTART_COUNT:-0}

# Trains `$recipe` (a name, or a YAML file) in a run folder of its own; arguments are settings.
train() {
    check_arguments "$@"
    find_recipe
    find_shards
    if [ -n "${SUBMITTING:-}" ]; then
        exec "$PYTHON" "$FROZEN_CODE/pipeline/train.py" --config "$recipe" --data "$data" --dry-run "$@" > /dev/null
    fi
    run_dir=${RUN_DIR:-$RUNS/$name}
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        run_dir=$run_dir-seed$SLURM_ARRAY_TASK_ID
        set -- "$@" "train.seed=$SLURM_ARRAY_TASK_ID"
    fi
    begin_attempt "$run_dir"
    stage_shards
    count_processes
    local before rc=0
    before=$(mark_time)
    launch train.py --config "$recipe" --data "$data" --run-dir "$run_dir" \
        train.expect_processes="$NUM_PROCESSES" train.cpu_threads="$OMP_NUM_THREADS" "$@" || rc=$?
    report_training "$rc" "$before"
}

# Evaluates a run; all arguments go to pipeline/evaluate.py; the first is the run's folder.
evaluate() {
    [ -d "${1:-}" ] || die "name the run's folder: slurm/evaluate.sh RUN --data DIR --split test; there is no '${1:-}' in $PWD"
    [ -z "${SUBMITTING:-}" ] || exit 0
    begin_attempt "$1"
    count_processes
    local rc=0
    launch evaluate.py --threads "$OMP_NUM_THREADS" "$@" || rc=$?
    report_by_code "$rc"
}

# Makes a shard set; all arguments go to `python -m shard_data`, which resumes an earlier attempt.
make_shards() {
    [ $# -gt 0 ] || die "say what to make, for instance: slurm/shard_data.sh mnist --source DIR --out data/mnist"
    [ -z "${SUBMITTING:-}" ] || exit 0
    begin_attempt "$*"
    local rc=0
    run_step srun --ntasks=1 --nodes=1 --kill-on-bad-exit=1 \
        "$PYTHON" -m shard_data "$1" --workers "${SLURM_CPUS_PER_TASK:-1}" "${@:2}" || rc=$?
    report_by_code "$rc"
}

# --- before anything is launched

check_arguments() {
    local argument
    for argument in "$@"; do
        case $argument in
            --run-dir*) die "name the run folder by the variable RUN_DIR, not by $argument: the job looks there for how training ended" ;;
            --data | --data=* | data.root=*) die "name the shard set by the variable DATA, not by $argument: the job checks and copies it" ;;
            --model* | --config*) die "name a recipe as the first argument of slurm/baselines.sh, not by $argument" ;;
        esac
    done
}

# A recipe's name or file in `$recipe` -> its frozen file, and the run's `$name`.
find_recipe() {
    name=$(basename "$recipe" .yaml)
    case $recipe in
        *.yaml)
            [ -f "$FROZEN_CODE/recipes/$name.yaml" ] || die "there is no file $recipe in $PWD"
            recipe=$FROZEN_CODE/recipes/$name.yaml ;;
        *) recipe=$FROZEN_CODE/pipeline/configs/$name.yaml ;;
    esac
    [ -f "$recipe" ] || die "there is no recipe '$name'; those of the project: $(basename -s .yaml -a "$FROZEN_CODE"/pipeline/configs/*.yaml | paste -sd ' ')"
    command -v "$PYTHON" > /dev/null || die "no python at $PYTHON: run \`make install\` once, or set PYTHON in slurm/site.sh"
}

# -> `$data`: what DATA names, or the recipe. Checked before GPUs are in use.
find_shards() {
    local root source
    { read -r root; read -r source; } < <("$PYTHON" -c '
import sys, yaml
data = yaml.safe_load(open(sys.argv[1])).get("data", {})
print(data.get("root") or "", data.get("source") or "SOURCE", sep="\n")' "$recipe")
    data=${DATA:-$root}
    [ -n "$data" ] || die "the recipe $name names no shard set; give one by the variable DATA"
    if [[ $data == *://* || -f $data/manifest.json || -n ${SHARDS_LATER:-} ]]; then return; fi
    die "$data holds no complete shard set (no manifest.json); this job makes it:
  slurm/submit.sh slurm/shard_data.sh $source --out $data"
}

begin_attempt() { # WHAT
    attempts=.slurm/job-$job.attempts
    [ "$attempt" -gt 0 ] || : > "$attempts"
    say "job $job, attempt $attempt on $SLURM_JOB_NODELIST: $1"
    say "code: $FROZEN_CODE ($(cat "$FROZEN_CODE/REVISION"))"
}

# Copies the shards to each node's own disk, and compares them with their hashes; complete ones from an earlier attempt are kept.
stage_shards() {
    if [ -z "$STAGE" ] || [[ $data == *://* ]]; then return; fi
    local rc=0
    run_step srun --ntasks-per-node=1 --kill-on-bad-exit=1 "$PYTHON" "$FROZEN_CODE/slurm/stage.py" "$data" "$STAGE" || rc=$?
    case $rc in
        0) data=$("$PYTHON" "$FROZEN_CODE/slurm/stage.py" --where "$data" "$STAGE") ;;
        1) requeue_or_give_up "$rc" killed 0 ;; # another node may have space
        *) report_by_code "$rc" ;;
    esac
}

# --- the program on all nodes

# -> the variables that slurm/node.sh reads.
count_processes() {
    local per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    [ -n "$per_node" ] || die "the job has no GPUs: ask for them (--gpus-per-node=8), or set PROCESSES_PER_NODE to train on CPUs"
    export NUM_PROCESSES=$((SLURM_JOB_NUM_NODES * per_node))
    local cpus=${SLURM_CPUS_PER_TASK:-1}
    export OMP_NUM_THREADS=$((cpus > per_node ? cpus / per_node : 1))
    export SRUN_CPUS_PER_TASK=$cpus # srun does not inherit it
    MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MAIN_PROCESS_IP
    export MAIN_PROCESS_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node use different ports
}

launch() { # SCRIPT ARGUMENT...
    local script=$FROZEN_CODE/pipeline/$1
    run_step srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash "$FROZEN_CODE/slurm/node.sh" "$script" "${@:2}"
}

# Runs a command in the background, since bash handles signals only between commands. Returns the command's exit code, or
# 124 if it did not stop in time. USR1 is sent to the step repeatedly: a signal that arrives before the processes handle
# it is lost.
run_step() {
    local step deadline rc=0
    "$@" &
    step=$!
    until [ -n "$stopping" ] || ! kill -0 "$step" 2> /dev/null; do
        wait "$step" || true
    done
    [ -z "$stopping" ] || deadline=$(nine_tenths_of_the_time_left)
    while kill -0 "$step" 2> /dev/null; do
        scancel --signal=USR1 "$job" || true
        sleep 3
        [ "$(date +%s)" -lt "$deadline" ] || { say "the step did not stop in time; not waiting any longer"; return 124; }
    done
    wait "$step" || rc=$?
    return "$rc"
}

# -> seconds since 1970. At the time limit itself SLURM would end the job for good.
nine_tenths_of_the_time_left() {
    local now ends
    now=$(date +%s)
    ends=$(squeue --noheader --format=%e --jobs="$job" | grep .) || ends="4 minutes" # no answer; --signal leaves five
    ends=$(date -d "$ends" +%s 2> /dev/null) || ends=$((now + 3600)) # no limit
    echo $((now + (ends - now) * 9 / 10))
}

# --- afterwards: done, requeue or give up

mark_time() { stat -c %y "$run_dir/status.json" 2> /dev/null || true; }

# RUN/status.json decides: an exit code does not distinguish a kill from an error.
report_training() { # RC MARK_TIME_BEFORE
    local state step
    read -r state step < <("$PYTHON" -c '
import pathlib, sys
from pipeline.storage.status import read_status
status = read_status(pathlib.Path(sys.argv[1]))
print(status.state, status.step)' "$run_dir")
    if [ "$(mark_time)" = "$2" ] && [ "$state" != finished ]; then
        [ "$1" != 0 ] || exit 0 # nothing was to be trained: --dry-run
        state=$([ -n "$stopping" ] && echo preempted || echo none)
        # At a job's first start: an error in the command. Later it worked before, so a disk or a host has a fault.
        if [ "$1" = 2 ] && [ "$attempt$state" = 0none ]; then
            say "refused: nothing was trained in $run_dir; see the message above. RUN_DIR names another folder."
            exit 2
        fi
    fi
    case $state in
        finished)
            if [ "$1" != 0 ] && [ "$(mark_time)" = "$2" ]; then # a refused resume leaves status.json as it was
                say "refused: the run in $run_dir is finished; see the message above"
                exit "$1"
            fi
            say "finished: step $step"
            exit 0 ;;
        failed) say "failed: $run_dir/status.json says why; not requeued"; exit $(($1 > 0 ? $1 : 1)) ;;
        interrupted) give_up "interrupted at step $step by SIGINT" ;;
        *) requeue_or_give_up "$1" "$state" "$step" ;;
    esac
}

# Other programs have only an exit code: below 124 they ended by themselves, except for 80 to 83 (pipeline/distributed/
# watchdog.py: a process hung, failed or was lost).
report_by_code() { # RC
    if [ "$1" -lt 124 ] && { [ "$1" -lt 80 ] || [ "$1" -gt 83 ]; }; then exit "$1"; fi
    requeue_or_give_up "$1" "$([ -n "$stopping" ] && echo preempted || echo killed)" 0
}

requeue_or_give_up() { # RC STATE STEP: unfinished
    say "attempt $attempt stopped: $2 at step $3, exit code $1"
    echo "$2 $3" >> "$attempts"
    local failures
    failures=$(failures_in_a_row)
    [ "$failures" -lt "$MAX_FAILURES" ] || give_up "$failures attempts in a row failed without progress (MAX_FAILURES)"
    [ $((attempt + 1)) -lt "$MAX_ATTEMPTS" ] || give_up "this was the last of $MAX_ATTEMPTS attempts (MAX_ATTEMPTS)"
    scontrol requeue "$job" || give_up "SLURM did not requeue the job"
    say "requeued"
    exit 0
}

# Failed attempts since the last that was preempted or got further than all earlier ones.
failures_in_a_row() {
    awk '{ failures = $1 == "preempted" || $2 > best ? 0 : failures + 1 } $2 > best { best = $2 } END { print failures }' "$attempts"
}

give_up() { # WHY
    say "unfinished, not requeued: $1. Submit the same command again to resume."
    exit 75
}
