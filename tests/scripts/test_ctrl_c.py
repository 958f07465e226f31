"""Ctrl-C: the first finishes the step, writes a checkpoint and ends with 130; the second ends at once. Likewise SIGTERM
where it ends the launcher.
"""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from pipeline.storage.status import read_status
from tests.helpers.launching import (
    ROOT,
    TRAIN,
    clean_environment,
    launch_command,
    ranks_of,
    run_command,
    started,
    wait_until,
)
from tests.helpers.recipes import write_tiny_recipe, write_tiny_set
from tests.helpers.run_folders import differences, metrics

SLOW = """
    import hashlib, os, sys
    from pipeline import train
    from pipeline.training.trainer import Trainer
    take_step = Trainer.train_step
    def slow(trainer, step, micro_batches):
        if step >= int(os.environ["SLOW_FROM"]):
            hashlib.pbkdf2_hmac("sha256", b"", b"", int(os.environ["ITERATIONS"]))  # one call of a C function
        return take_step(trainer, step, micro_batches)
    Trainer.train_step = slow
    sys.exit(train.main())
"""
"""train.py whose steps, from one step on, take long in a function that runs no signal handler of Python."""
A_SECOND, MINUTES = "3000000", "2000000000"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Twelve steps with a loader worker; no checkpoint before the end."""
    folder = tmp_path_factory.mktemp("ctrl_c")
    (folder / "train.py").write_text(textwrap.dedent(SLOW))
    return write_tiny_recipe(
        folder,
        write_tiny_set(folder / "data"),
        train={"steps": 12},
        data={"trace": True, "workers": 1},
        checkpoint={"every": 0},
        validation={"every": 0},
        samples={"every": 0},
    )


def environment(iterations: str) -> dict[str, str]:
    return clean_environment(PYTHONPATH=str(ROOT), ITERATIONS=iterations, SLOW_FROM="3", OMP_NUM_THREADS="1")


def arguments(recipe: Path, run_dir: Path) -> list[str]:
    return ["--config", str(recipe), "--run-dir", str(run_dir)]


def press_ctrl_c(process: subprocess.Popen) -> None:
    """What a terminal does: every process of the foreground group gets the signal."""
    os.killpg(process.pid, signal.SIGINT)


def await_step(run_dir: Path, step: int) -> None:
    path = run_dir / "metrics.jsonl"
    wait_until(lambda: path.is_file() and f'{{"step": {step},' in path.read_text(), timeout=120, interval=0.02)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_ctrl_c_under_accelerate_finishes_the_step_and_saves(recipe, tmp_path, processes):
    """With one process the launcher ends a quarter of a second later, in the middle of the step; with two it passes the
    signal on to ranks that are in sessions of their own. The same command then resumes.
    """
    run_dir = tmp_path / "run"
    command = launch_command(processes, recipe.parent / "train.py", *arguments(recipe, run_dir))
    with started(command, env=environment(A_SECOND)) as launcher:
        await_step(run_dir, 3)
        ranks = ranks_of(launcher)
        workers = [child for rank in ranks for child in rank.children()]
        assert (len(ranks), len(workers)) == (processes, processes)
        press_ctrl_c(launcher)
        _, output = launcher.communicate(timeout=120)
        assert psutil.wait_procs(ranks + workers, timeout=60)[1] == []
    status = read_status(run_dir)
    assert (status.state, status.reason) == ("interrupted", "SIGINT"), output
    assert status.step >= 4
    assert f"stopped by Ctrl-C at step {status.step} of 12 with a checkpoint" in (run_dir / "log.txt").read_text()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{status.step:08d}"]
    assert output.count("Ctrl-C: finishing this step") == 1
    assert "launcher" not in (run_dir / "log.txt").read_text()  # its end is not taken for a failure
    if processes == 1:
        assert_resumes(recipe, run_dir, status.step)


@pytest.mark.slow
def test_sigterm_of_the_group_under_accelerate_finishes_the_step_and_saves(recipe, tmp_path):
    """As `kill %1` and `timeout` send it. With one process it ends the launcher at once."""
    command = launch_command(1, recipe.parent / "train.py", *arguments(recipe, tmp_path / "run"))
    with started(command, env=environment(A_SECOND)) as launcher:
        await_step(tmp_path / "run", 3)
        ranks = ranks_of(launcher)
        os.killpg(launcher.pid, signal.SIGTERM)
        _, output = launcher.communicate(timeout=120)
        assert psutil.wait_procs(ranks, timeout=60)[1] == []
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason) == ("preempted", "SIGTERM"), output
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step_{status.step:08d}"]


def assert_resumes(recipe: Path, run_dir: Path, step: int) -> None:
    uninterrupted = run_dir.with_name("uninterrupted")
    for folder in (run_dir, uninterrupted):
        done = run_command(sys.executable, TRAIN, *arguments(recipe, folder), "checkpoint.every=12")
        assert done.returncode == 0, done.stderr
        assert (f"at step {step}" in done.stderr) == (folder == run_dir)
    assert list(differences(uninterrupted, run_dir)) == []
    assert len(metrics(run_dir)) == 12


def test_without_a_launcher_the_exit_code_is_130(recipe, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, str(recipe.parent / "train.py"), *arguments(recipe, run_dir)]
    with started(command, env=environment(A_SECOND)) as process:
        await_step(run_dir, 3)
        press_ctrl_c(process)
        _, output = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert read_status(run_dir).state == "interrupted"


@pytest.mark.slow
def test_the_second_ctrl_c_ends_at_once_and_promises_no_checkpoint(recipe, tmp_path):
    """In the middle of a step that would take many minutes."""
    run_dir = tmp_path / "run"
    command = [sys.executable, str(recipe.parent / "train.py"), *arguments(recipe, run_dir)]
    with started(command, env=environment(MINUTES)) as process:
        await_step(run_dir, 3)
        workers = psutil.Process(process.pid).children()
        press_ctrl_c(process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        press_ctrl_c(process)
        _, output = process.communicate(timeout=20)
        assert psutil.wait_procs(workers, timeout=20)[1] == []
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert output.splitlines()[-1] == (
        "interrupted; the same command continues from the beginning: there is no checkpoint yet"
    )
    status = read_status(run_dir)
    assert (status.state, status.step) == ("interrupted", 0)


@pytest.mark.slow
def test_two_processes_end_at_the_second_ctrl_c(recipe, tmp_path):
    """torchrun, in our launcher, passes the second one on as SIGTERM."""
    run_dir = tmp_path / "run"
    command = launch_command(2, recipe.parent / "train.py", *arguments(recipe, run_dir))
    command[1:3] = [str(ROOT / "pipeline/launch.py")]
    with started(command, env=environment(MINUTES)) as launcher:
        await_step(run_dir, 3)
        ranks = ranks_of(launcher)
        for _ in range(2):
            press_ctrl_c(launcher)
            psutil.wait_procs(ranks, timeout=2)
        assert psutil.wait_procs(ranks, timeout=15)[1] == []  # torchrun kills after 30 s
        launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert read_status(run_dir).state == "interrupted"


def test_a_background_job_ignores_ctrl_c(recipe, tmp_path):
    """A shell without job control starts background jobs with SIGINT ignored."""
    run_dir = tmp_path / "run"
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, TRAIN, *arguments(recipe, run_dir)]
    with started(command, env=environment(A_SECOND)) as process:
        await_step(run_dir, 3)
        press_ctrl_c(process)
        _, output = process.communicate(timeout=120)
    assert (process.returncode, read_status(run_dir).state) == (0, "finished"), output
