"""A real SLURM of two emulated nodes on this machine, and a checkout to submit jobs from.

SLURM_LAB names the script that brings the cluster up. Its commands are `up`, `down`, `wait JOB SECONDS` (prints the
job's final state), `node-fail NODE` and `node-start NODE`. It reads the SLAB_* variables below, and puts sbatch,
squeue, ... into SLAB_DIR/bin.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("pipeline", "shard_data", "accelerate_configs", "slurm")
SETTINGS = {"SLAB_GPUS": "8", "SLAB_CPUS": "64", "SLAB_MEM": "500000", "SLAB_KILLWAIT": "10", "SLAB_REQUEUEWAIT": "5"}
ON_CPUS = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem-per-cpu=100")
OURS = ("PYTHON", "RUNS", "RUN_DIR", "STAGE", "DATA", "FROZEN_CODE", "SUBMITTING", "PROCESSES_PER_NODE", "PYTHONPATH")


class Lab:
    """The cluster. Commands run on its login host, in a checkout's folder."""

    def __init__(self, script: str, **settings: str):
        self.script = script
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
        self.folder.chmod(0o755)  # munge requires it
        kept = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment = kept | SETTINGS | settings | {"SLAB_DIR": str(self.folder), "PYTHON": sys.executable}
        self.scratch = self.folder / "local_scratch"

    def up(self) -> None:
        """Skips the tests on a machine that cannot run the cluster."""
        try:
            started = self.control("up", timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip("the SLURM cluster did not start within 120 s")
        if started.returncode:
            pytest.skip(f"no SLURM cluster on this machine: {started.stderr.strip()[-300:]}")
        self.environment["PATH"] = f"{self.folder / 'bin'}:{self.environment['PATH']}"

    def down(self) -> None:
        self.control("down", timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def control(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess:
        return self.run("bash", self.script, *words, timeout=timeout)

    def run(self, *command: str, cwd: Path = ROOT, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=cwd, env=self.environment | env, capture_output=True, text=True, timeout=timeout
        )


class Checkout:
    """What a user has cloned: the code that jobs need, with a place for data and runs."""

    def __init__(self, lab: Lab, folder: Path):
        self.lab, self.folder = lab, folder
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        return self.lab.run(*command, cwd=self.folder, **env)

    def submit(self, *words: str, by: str = "sbatch", **env: str) -> "Job":
        """With plain sbatch, or `by` slurm/submit.sh. PROCESSES_PER_NODE=1: the jobs train on CPUs."""
        done = self.run(by, *words, **{"PROCESSES_PER_NODE": "1"} | env)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.split()[-1])

    def replace_training(self, text: str) -> None:
        """Puts a short program in the place of pipeline/train.py, for what concerns only the launcher."""
        (self.folder / "pipeline" / "train.py").write_text(text)


class Job:
    """A submitted job, or the task of an array."""

    def __init__(self, checkout: Checkout, number: str):
        self.checkout, self.number = checkout, number

    def log(self) -> str:
        """All attempts' output so far."""
        found = list(self.checkout.folder.glob(f"*-{self.number}.log"))
        return found[0].read_text() if found else ""

    def state(self) -> str:
        return self.checkout.run("squeue", "--noheader", "--format=%T", f"--jobs={self.number}").stdout.strip()

    def wait(self, seconds: int = 240) -> str:
        """Its final state, as SLURM calls it."""
        done = self.checkout.lab.control("wait", self.number, str(seconds), timeout=seconds + 60)
        return done.stdout.strip()

    def exit_code(self) -> int:
        shown = self.checkout.run("scontrol", "-o", "show", "job", self.number).stdout
        return int(shown.partition("ExitCode=")[2].partition(":")[0])

    def wait_for(self, what: Callable[[], bool], seconds: float = 120) -> None:
        """Until something is the case; fails with the job's log where it never is."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.log()
            time.sleep(0.2)
