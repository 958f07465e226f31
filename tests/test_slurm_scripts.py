"""The scripts of slurm/ without a cluster: shellcheck, staging, and failure counting with stubs of SLURM's commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shard_data import ToyFaces, convert
from shard_data.file_lock import FileLock
from shard_data.manifest import load
from shard_data.verify import verify
from tests.helpers.paper_table import PAPER
from tests.helpers.shard_sets import edit_manifest
from tests.helpers.slurm_lab import FOLDERS, OURS, ROOT
from tests.helpers.vdvae_table import VDVAE

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
def test_shellcheck():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "slurm").glob("*.sh"))
    found = subprocess.run([SHELLCHECK, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_papers_jobs_ask_for_the_papers_gpus():
    """One script for each recipe of the paper, and in all headers what the launcher relies on."""
    found = {}
    for path in (ROOT / "slurm").glob("*.sh"):
        text = path.read_text()
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", text, re.MULTILINE))
        if not options:
            continue
        assert options["job-name"] == path.stem
        assert (options["ntasks-per-node"], options["signal"], options["open-mode"]) == ("1", "B:USR1@300", "append")
        assert "requeue" in options
        if not path.name.startswith(("nvae_", "vdvae_")):
            continue
        assert int(options["cpus-per-task"]) == 6 * int(options["gpus-per-node"])
        (recipe,) = re.findall(r"^recipe=(\w+)$", text, re.MULTILINE)
        found[recipe] = int(options["nodes"]), int(options["gpus-per-node"])
    assert found == {name: (row.nodes, row.gpus_per_node) for name, row in (PAPER | VDVAE).items()}


@pytest.fixture
def faces(tmp_path) -> Path:
    """A small set of six shards."""
    convert(ToyFaces(16, train=17, val=1, test=1), tmp_path / "faces", shard_size=5)
    return tmp_path / "faces"


def stage(root: Path, scratch: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "slurm/stage.py", str(root), str(scratch)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)


def staged(root: Path, scratch: Path, copied: int) -> Path:
    """Copies the set, which must have taken so many files; the copy is what `shard_data verify` accepts."""
    done = stage(root, scratch)
    assert done.returncode == 0, done.stderr
    assert f"is complete: 12 files, {copied} of them copied now" in done.stderr
    (copy,) = (path.parent for path in scratch.glob("*/manifest.json"))
    assert verify(copy, decode=True) == []
    return copy


def test_staged_shards_are_complete_and_only_others_are_copied_again(faces, tmp_path):
    scratch = tmp_path / "scratch"
    copy = staged(faces, scratch, copied=12)
    staged(faces, scratch, copied=0)
    for corrupt in (lambda data: data[:-1], lambda data: data[:700] + b"x" + data[701:], lambda data: b""):
        tar = copy / "train-000001.tar"
        tar.write_bytes(corrupt(tar.read_bytes()))
        staged(faces, scratch, copied=1)
    (copy / "test-000000.index.npy").unlink()
    staged(faces, scratch, copied=1)


def test_a_corrupt_set_is_not_staged(faces, tmp_path):
    tar = faces / "train-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    done = stage(faces, tmp_path / "scratch")
    assert done.returncode == 2
    assert f"{tar} is corrupt" in done.stderr
    assert list((tmp_path / "scratch").rglob("manifest.json")) == []
    assert list((tmp_path / "scratch").rglob(tar.name)) == []


def test_a_set_whose_name_leads_to_another_folder_is_not_staged(faces, tmp_path):
    edit_manifest(faces, lambda manifest: manifest.update(name="../../outside"))
    done = stage(faces, tmp_path / "in" / "scratch")
    assert done.returncode == 2
    assert "manifest.json: name: " in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces"]


def test_of_two_jobs_on_a_node_one_copies_and_the_other_names_it(faces, tmp_path):
    target = tmp_path / f"toy_faces-{load(faces)['fingerprint'][:12]}"
    target.mkdir()
    command = [sys.executable, "slurm/stage.py", str(faces), str(tmp_path)]
    with FileLock(target / ".lock") as lock:
        lines = []
        with subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, stderr=subprocess.PIPE, text=True
        ) as waiting:
            lines.append(waiting.stderr.readline())
            assert not list(target.glob("*.tar"))
            lock.release()
            lines += waiting.stderr
    assert f"waiting for process {os.getpid()} on " in lines[0]
    assert "is complete: 12 files, 12 of them copied now" in lines[-1]


def test_a_node_that_cannot_take_the_shards_says_so(faces, tmp_path):
    (tmp_path / "file").write_text("")
    done = stage(faces, tmp_path / "file" / "scratch")
    assert done.returncode == 1
    assert f"could not be copied to {tmp_path}/file/scratch" in done.stderr


# --- launch.sh counts failures

SRUN = """#!/usr/bin/env bash
exec "$PYTHON" "$0.py" "$@"
"""

PROGRAM = """import os, sys
from pathlib import Path
from pipeline.storage.status import StatusFile
Path("arguments").write_text(" ".join(sys.argv[1:]))
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
state, step = os.environ["ENDS"].split()
folder = Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
if state == "refused":
    sys.exit(2)
file = StatusFile(folder)
file.begin(int(step), 100)
if state == "killed":
    sys.exit(137)
file.end(state, "SIGUSR1")
"""
"""What an attempt leaves of itself."""

SCONTROL = """#!/usr/bin/env bash
[ "$1" = requeue ] || echo node1
"""


def write_stand_ins(folder: Path) -> None:
    for name, text in {"srun": SRUN, "srun.py": PROGRAM, "scontrol": SCONTROL}.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / ".slurm").mkdir()
    (folder / "code").mkdir()
    for name in FOLDERS:
        (folder / "code" / name).symlink_to(ROOT / name)
    (folder / "code" / "REVISION").write_text("test")


def attempt(
    folder: Path, number: int, ends: str, script: tuple[str, ...] = ("baselines.sh", "mlp_vae"), **settings: str
) -> subprocess.CompletedProcess:
    """One start of a job that trains; `ends`: the state and the step that the attempt leaves."""
    kept = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith(("SLURM_", "SBATCH_"))}
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_RESTART_COUNT": str(number),
        "PROCESSES_PER_NODE": "1",
        "FROZEN_CODE": str(folder / "code"),
        "PYTHON": sys.executable,
        "DATA": "http://nowhere/set",
        "ENDS": ends,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "slurm" / script[0]), *script[1:]]
    return subprocess.run(command, cwd=folder, env=kept | job | settings, capture_output=True, text=True, timeout=60)


def attempts_until_the_end(folder: Path, ends: list[str], **settings: str) -> tuple[int, subprocess.CompletedProcess]:
    """How many attempts the job makes, and the last one."""
    write_stand_ins(folder)
    for number, end in enumerate(ends):
        done = attempt(folder, number, end, **settings)
        if not done.stderr.endswith("requeued\n"):
            break
    return number + 1, done


def test_a_job_on_three_nodes_trains_its_recipe_with_all_of_their_gpus(tmp_path):
    write_stand_ins(tmp_path)
    job = {"SLURM_JOB_NUM_NODES": "3", "PROCESSES_PER_NODE": "", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "48"}
    done = attempt(tmp_path, 0, "finished 9", ("nvae_ffhq256.sh", "train.micro_batch=32"), **job)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "arguments").read_text()
    assert f"--config {tmp_path / 'code'}/pipeline/configs/nvae_ffhq256.yaml --data http://nowhere/set" in arguments
    assert "--run-dir runs/nvae_ffhq256 train.expect_processes=24 train.cpu_threads=6 train.micro_batch=32" in arguments


def test_failures_in_a_row_without_progress_end_the_job(tmp_path):
    """Progress and a stop on purpose start the count again."""
    ends = ["killed 0", "killed 5", "killed 5", "preempted 5", "killed 5", "killed 5", "killed 5"]
    count, last = attempts_until_the_end(tmp_path, ends, MAX_FAILURES="2")
    assert (count, last.returncode) == (6, 75), last.stderr
    assert "2 attempts in a row failed" in last.stderr


def test_progress_that_was_lost_again_counts_as_none(tmp_path):
    """Behind the furthest step that any attempt reached, an attempt gained nothing."""
    count, last = attempts_until_the_end(tmp_path, ["killed 9", "killed 3", "killed 4", "killed 5"], MAX_FAILURES="2")
    assert (count, last.returncode) == (3, 75), last.stderr


def test_attempts_are_limited_in_all(tmp_path):
    ends = ["killed 1", "killed 2", "killed 3", "killed 4"]
    count, last = attempts_until_the_end(tmp_path, ends, MAX_FAILURES="1", MAX_ATTEMPTS="3")
    assert (count, last.returncode) == (3, 75), last.stderr
    assert "the last of 3 attempts" in last.stderr


def test_a_finished_or_failed_run_is_not_requeued(tmp_path):
    assert attempts_until_the_end(tmp_path, ["finished 100"])[1].returncode == 0
    shutil.rmtree(tmp_path / "runs")
    failed = attempt(tmp_path, 0, "failed 3")
    assert failed.returncode == 1
    assert "not requeued" in failed.stderr


def test_a_refused_command_ends_the_job_at_its_first_attempt_alone(tmp_path):
    """Such as other settings than the run's. A command that worked before is tried again."""
    count, last = attempts_until_the_end(tmp_path, ["refused 0", "killed 0"])
    assert (count, last.returncode) == (1, 2), last.stderr
    assert "refused: nothing was trained in runs/mlp_vae" in last.stderr
    assert [attempt(tmp_path, number, end).returncode for number, end in enumerate(["killed 3", "refused 3"])] == [0, 0]
    assert (tmp_path / ".slurm/job-7.attempts").read_text() == "running 3\nnone 3\n"
    assert attempt(tmp_path, 0, "refused 3").returncode == 2  # another job in the run's folder


def test_every_attempt_finds_the_code_that_an_earlier_one_compiled(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    write_stand_ins(tmp_path)
    first, second = (attempt(tmp_path, number, "killed 1") for number in range(2))
    assert first.stdout == second.stdout == f"{tmp_path / '.slurm' / 'torchinductor'}\n"
    assert attempt(tmp_path, 2, "killed 1", TORCHINDUCTOR_CACHE_DIR="/scratch/me").stdout == "/scratch/me\n"


def test_an_interrupted_run_is_not_requeued(tmp_path):
    count, last = attempts_until_the_end(tmp_path, ["killed 2", "interrupted 3", "killed 4"])
    assert (count, last.returncode) == (2, 75), last.stderr
    assert "unfinished, not requeued: interrupted at step 3 by SIGINT" in last.stderr


def test_without_an_answer_of_squeue_the_step_still_gets_time_to_save(tmp_path):
    write_stand_ins(tmp_path)
    (tmp_path / "bin" / "squeue").write_text("#!/usr/bin/env bash\n$SQUEUE\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    script = 'source "$FROZEN_CODE/slurm/launch.sh"; now=$(date +%s); echo $(($(nine_tenths_of_the_time_left) - now))'
    settings = {"FROZEN_CODE": str(tmp_path / "code"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for answer, least, most in (("false", 215, 219), ("true", 215, 219), ("echo NONE", 3239, 3243)):
        environment = os.environ | settings | {"SQUEUE": answer}
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert least <= int(done.stdout) <= most, (answer, done)


def test_what_cannot_be_submitted_is_named(tmp_path):
    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run(["bash", *words], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stderr

    missing = "error: there is no slurm/nvae.sh; slurm/baselines.sh RECIPE trains any recipe\n"
    assert run("slurm/submit.sh", "--nodes=2", "slurm/nvae.sh") == (2, missing)
    assert run("slurm/submit.sh", "--nodes=2")[0] == 2
    assert run("slurm/baselines.sh") == (2, "error: name a recipe, or a recipe file: slurm/baselines.sh conv_vae\n")
    write_stand_ins(tmp_path)
    done = attempt(tmp_path, 0, "finished 1", ("baselines.sh", "mine.yaml"))
    assert (done.returncode, done.stderr) == (2, f"error: there is no file mine.yaml in {tmp_path}\n")
