"""How runs end: stopped by a signal, killed, or on a full disk; and that the same command resumes them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.storage.metrics_file import read_records
from pipeline.storage.status import read_status
from tests.helpers.launching import ROOT, TRAIN, clean_environment, launch_command, ranks_of, wait_until
from tests.helpers.recipes import write_tiny_recipe, write_tiny_set
from tests.helpers.run_folders import differences, metrics, read_lines
from tests.helpers.wandb_server import WandbServer


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """The tiny recipe for 40 steps, with a checkpoint at every tenth."""
    folder = tmp_path_factory.mktemp("stopping")
    return write_tiny_recipe(
        folder,
        write_tiny_set(folder / "data"),
        train={"steps": 40},
        data={"trace": True, "workers": 1},
        checkpoint={"every": 10},
        validation={"every": 40},
        samples={"every": 0},
    )


def start(processes: int, recipe: Path, run_dir: Path, *overrides: str, **variables: str) -> subprocess.Popen:
    command = launch_command(processes, TRAIN, "--config", str(recipe), "--run-dir", str(run_dir), *overrides)
    environment = clean_environment(**variables)
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    """Standard error of a run that must end with exit code 0."""
    _, output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def await_step(run_dir: Path, step: int) -> None:
    """Blocks until the run has logged this step."""
    path = run_dir / "metrics.jsonl"
    wait_until(lambda: path.is_file() and f'{{"step": {step},' in path.read_text(), timeout=120, interval=0.02)


@pytest.fixture(scope="module")
def uninterrupted(recipe_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(start(1, recipe_file, folder))
    return folder


@pytest.mark.slow
def test_sigterm_saves_after_the_current_step_and_the_same_command_resumes(recipe_file, uninterrupted, tmp_path):
    process = start(1, recipe_file, tmp_path / "run")
    await_step(tmp_path / "run", 3)
    ranks_of(process)[0].send_signal(signal.SIGTERM)
    output = finish(process)
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason, status.attempt) == ("preempted", "SIGTERM", 1)
    assert f"stopped by SIGTERM at step {status.step} of 40 with a checkpoint" in output
    assert 3 <= status.step < 40
    assert f"at step {status.step}" in finish(start(1, recipe_file, tmp_path / "run"))
    assert (read_status(tmp_path / "run").state, read_status(tmp_path / "run").attempt) == ("finished", 2)
    assert list(differences(uninterrupted, tmp_path / "run")) == []


@pytest.mark.slow
def test_sigusr1_to_one_rank_stops_both(recipe_file, tmp_path):
    process = start(2, recipe_file, tmp_path / "run")
    await_step(tmp_path / "run", 3)
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    output = finish(process)
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason) == ("preempted", "SIGUSR1")
    assert f"stopped by SIGUSR1 at step {status.step} of 40 with a checkpoint" in output


@pytest.mark.slow
def test_a_killed_run_is_marked_running_and_a_failed_one_failed(recipe_file, tmp_path):
    process = start(1, recipe_file, tmp_path / "run")
    await_step(tmp_path / "run", 15)  # the checkpoint of step 10 is complete
    process.kill()
    process.communicate()
    assert read_status(tmp_path / "run").state == "running"
    again = start(1, recipe_file, tmp_path / "run", "optim.beta1=0.5")  # the orphaned rank may still be about to end
    _, output = again.communicate(timeout=120)
    assert again.returncode != 0
    assert "the checkpoint was made with other settings" in output
    assert read_status(tmp_path / "run").state == "running"
    diverging = start(
        1, recipe_file, tmp_path / "other", "optim.lr=1e30", "optim.warmup_steps=0", "train.max_skipped_steps=2"
    )
    _, output = diverging.communicate(timeout=120)
    status = read_status(tmp_path / "other")
    assert (diverging.returncode, status.state) == (1, "failed")
    assert "lower optim.lr" in status.reason
    assert "lower optim.lr" in output


@pytest.mark.slow
def test_a_refused_resume_changes_nothing_in_a_finished_run(uninterrupted, tmp_path):
    """Other settings and `never`: exit code 2, and every file but the lock is as it was. The way on is `changed`."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    before = contents(folder)
    for arguments, message in (
        (("optim.lr=0.005",), "optim.lr: 0.01 -> 0.005"),
        (("--resume", "never"), "holds checkpoints up to step 40"),
    ):
        ended = train_again(folder, *arguments)
        assert ended.returncode == 2
        assert message in ended.stderr
        assert f"--run-dir {tmp_path}/run-2" in ended.stderr or f"for instance {tmp_path}/run-2" in ended.stderr
        assert contents(folder) == before
    again = train_again(folder)
    assert again.returncode == 0
    assert "train.steps above 40 trains longer" in again.stderr
    changed = train_again(folder, "--resume", "changed", "optim.lr=0.005", "train.steps=41")
    assert changed.returncode == 0, changed.stderr
    assert "optim.lr: 0.01 -> 0.005" in (folder / "log.txt").read_text()
    assert read_status(folder).step == 41


def train_again(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command with the settings of the run in this folder."""
    command = [sys.executable, "pipeline/train.py", "--config", str(folder / "config.yaml"), "--run-dir", str(folder)]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "run.lock"}


@pytest.mark.slow
def test_wandb_gets_one_continuous_run(recipe_file, tmp_path):
    """Online against a stand-in for the server: killed, stopped, finished; every step once, and pictures."""
    with WandbServer() as server:
        online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "local" + "0" * 35, "WANDB_MODE": "online"}
        overrides = ("tracking.wandb=online", "samples.every=20", "samples.count=4")
        killed = start(1, recipe_file, tmp_path / "run", *overrides, **online)
        await_step(tmp_path / "run", 13)
        ranks_of(killed)[0].kill()
        killed.communicate()
        stopped = start(1, recipe_file, tmp_path / "run", *overrides, **online)
        await_step(tmp_path / "run", 23)
        ranks_of(stopped)[0].send_signal(signal.SIGUSR1)
        finish(stopped)
        finish(start(1, recipe_file, tmp_path / "run", *overrides, **online))
    (run,) = server.runs.values()
    records = list(read_records(tmp_path / "run/metrics.jsonl"))
    assert [row["_step"] for row in run.history] == [record["step"] for record in records] == list(range(1, 41))
    for row, record in zip(run.history, records, strict=True):
        assert row["train/loss"] == record["train/loss"], record["step"]
    assert sorted({record["attempt"] for record in records}) == [1, 2, 3]
    assert run.exit_codes[-1] == 0
    assert any(name.endswith(".png") for name in run.files)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_training_does_not_end_it(recipe_file, uninterrupted, small_disk, tmp_path):
    """Full while checkpoints are due, free again before the last one: the run finishes with the same weights."""
    run_dir = small_disk / "run"
    process = start(1, recipe_file, run_dir)
    await_step(run_dir, 3)
    ballast = small_disk / "ballast"
    fill(ballast)
    await_log(run_dir, "could not be written")
    ballast.unlink()
    output = finish(process)
    assert "could not be written" in output
    assert read_status(run_dir).state == "finished"
    assert [line for line in differences(uninterrupted, run_dir) if "safetensors" in line] == []


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_costs_no_training(recipe_file, uninterrupted, small_disk):
    """Freed after ten steps: nothing but the trace of these steps is missing in the end."""
    run_dir, ballast = small_disk / "run", small_disk / "ballast"
    fill(ballast)
    process = start(1, recipe_file, run_dir, "samples.every=5", "samples.count=4")
    shown = []
    while "step 10/40" not in "".join(shown[-1:]):
        shown.append(process.stderr.readline())
        assert shown[-1], "".join(shown)
    ballast.unlink()
    output = "".join(shown) + finish(process)
    assert "Traceback" not in output
    for file in ("config.yaml", "run_id", "log.txt", "metrics.jsonl", "data_trace.jsonl", "status.json", "samples"):
        assert len(re.findall(rf"{small_disk}/run/{file}.*No space left", output)) == 1, (file, output)
    assert [line for line in differences(uninterrupted, run_dir) if "data_trace" not in line] == []
    assert read_status(run_dir).state == "finished"
    logged = (run_dir / "log.txt").read_text()
    assert all(f"step {step:2}/40" in logged for step in range(1, 41))
    traced = [line["step"] for line in read_lines(run_dir / "data_trace.jsonl")]
    assert traced == list(range(traced[0], 40))


def fill(ballast: Path) -> None:
    """Fills the disk to the last byte."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 65536):
            pass


def await_log(run_dir: Path, text: str) -> None:
    """Blocks until the log contains the text or the run is over (on a full disk the log may stay empty)."""
    end = time.monotonic() + 60
    while time.monotonic() < end and read_status(run_dir).state == "running":
        if text in (run_dir / "log.txt").read_text():
            return
        time.sleep(0.05)


@pytest.mark.slow
def test_the_comparison_of_runs_sees_a_difference(tmp_path, uninterrupted, recipe_file):
    """Another seed gives other weights, another trace and other metrics."""
    other = tmp_path / "run"
    finish(start(1, recipe_file, other, "train.seed=2"))
    assert any("model.safetensors" in line for line in differences(uninterrupted, other))
    assert any("data_trace" in line for line in differences(uninterrupted, other))
    assert len(metrics(uninterrupted)) == 40
    assert "metrics.jsonl differs" in list(differences(uninterrupted, other))
