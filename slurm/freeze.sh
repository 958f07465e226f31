#!/usr/bin/env bash
# Copies the code into .slurm/code-HASH and prints the folder's name. Equal code gives the same folder.
#
#   slurm/freeze.sh [ARGUMENT...]     # recipe files (*.yaml) among a job's arguments are copied too
#
# Within a job, the first start copies the code and later ones use the same copy. If files changed between submission
# and the first start, the submitted code is lost: the job ends with exit code 2 and lists them.
set -euo pipefail
shopt -s inherit_errexit

sources=(pipeline shard_data accelerate_configs slurm)
recipes=()
for argument in "$@"; do
    if [[ $argument == *.yaml && -f $argument ]]; then recipes+=("$argument"); fi
done

copy_code() {
    local new code
    mkdir -p .slurm
    new=$(mktemp -d .slurm/new-XXXXXX)
    chmod 755 "$new"
    tar -cf - --exclude=__pycache__ "${sources[@]}" | tar -xf - -C "$new"
    mkdir "$new/recipes"
    [ ${#recipes[@]} = 0 ] || cp "${recipes[@]}" "$new/recipes"
    { git describe --always --dirty --abbrev=12 2> /dev/null || echo "not a git checkout"; } > "$new/REVISION"
    code=.slurm/code-$(cd "$new" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12)
    mv -T "$new" "$code" 2> /dev/null || rm -rf "$new" # the same code is there already
    [ -d "$code" ] || { echo "error: $code could not be made in $PWD" >&2; exit 1; }
    echo "$PWD/$code"
}

# Files changed after the job was submitted; SLURM reports whole seconds, so changes within the second of
# submission are accepted.
changed_since() {
    find "${sources[@]}" "${recipes[@]}" -type f -not -path '*/__pycache__/*' -newerct "@$(($1 + 1))"
}

code_of_this_job() {
    local link=.slurm/job-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}.code job=$1 submitted changed code
    submitted=$(scontrol -o show job "$job" | sed -n 's/.* SubmitTime=\([^ ]*\) .*/\1/p')
    submitted=$(date -d "$submitted" +%s)
    # An older link belongs to a job with the same id: of another cluster, or from before SLURM restarted its numbering.
    if [ -L "$link" ] && { [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || [ "$(stat -c %Y "$link")" -ge "$submitted" ]; }; then
        readlink "$link"
        return
    fi
    mapfile -t changed < <(changed_since "$submitted")
    if [ ${#changed[@]} -gt 0 ]; then
        { echo "error: these files changed since the job was submitted, so the submitted code is lost:"
          printf '  %s\n' "${changed[@]}"
          echo "Submit again. slurm/submit.sh copies the code at submission; then files may change while the job waits."
        } >&2
        exit 2
    fi
    code=$(copy_code)
    ln -sfn "$code" "$link"
    echo "$code"
}

if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SUBMITTING:-}" ]; then
    mkdir -p .slurm
    code_of_this_job "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
else
    copy_code
fi
