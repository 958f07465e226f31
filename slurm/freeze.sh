#!/usr/bin/env bash
# Copies the code into .slurm/code-HASH and prints the folder's name. Equal code makes one folder, whoever asks.
#
#   slurm/freeze.sh [WORD...]     # of a job's words, recipe files (*.yaml) are copied too
#
# Within a job, the first start copies and every later one finds the same folder again. What was changed between
# submission and the first start is not known any more, so it ends the job: exit code 2, with the list.
set -euo pipefail
shopt -s inherit_errexit

sources=(pipeline shard_data accelerate_configs slurm)
recipes=()
for word in "$@"; do
    if [[ $word == *.yaml && -f $word ]]; then recipes+=("$word"); fi
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

# Files changed after the job was submitted; SLURM tells whole seconds, so the second of submission itself is let pass.
changed_since() {
    find "${sources[@]}" "${recipes[@]}" -type f -not -path '*/__pycache__/*' -newerct "@$(($1 + 1))"
}

code_of_this_job() {
    local link=.slurm/job-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}.code job=$1 submitted changed code
    submitted=$(scontrol -o show job "$job" | sed -n 's/.* SubmitTime=\([^ ]*\) .*/\1/p')
    submitted=$(date -d "$submitted" +%s)
    # An older link is of a job of the same number on another cluster, or from before SLURM began to count anew.
    if [ -L "$link" ] && { [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || [ "$(stat -c %Y "$link")" -ge "$submitted" ]; }; then
        readlink "$link"
        return
    fi
    mapfile -t changed < <(changed_since "$submitted")
    if [ ${#changed[@]} -gt 0 ]; then
        { echo "error: changed since the job was submitted, so that what was submitted is not there any more:"
          printf '  %s\n' "${changed[@]}"
          echo "Submit again; slurm/submit.sh in place of sbatch copies the code at once, and files may change while the job waits."
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
