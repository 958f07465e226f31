"""Starts the project's commands in processes of their own, in an environment without an outer launcher's variables."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipeline.distributed.launcher import MARKS

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "pipeline" / "train.py")
LAUNCHER_VARIABLES = MARKS | {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
TIMEOUT = 60
"""Seconds. For what takes a few seconds on an idle machine."""


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a launcher or a test of W&B left there, and with these changes."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return kept | changes


def run_command(
    *command: str, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """The finished process, with its output as text."""
    return subprocess.run(
        command, cwd=cwd, env=clean_environment(**environment), capture_output=True, text=True, timeout=timeout
    )


def launch_command(processes: int, script: str | Path, *arguments: str, port: int = 0) -> list[str]:
    """`accelerate launch` with the shipped configuration; port 0 is a free one."""
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml")
    several = ["--num_processes", str(processes), "--main_process_port", str(port)] if processes > 1 else []
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launcher, *several, str(script), *arguments]


def launch(processes: int, script: str | Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A script on this many processes, finished."""
    return run_command(*launch_command(processes, script, *arguments), **environment)


def train_alone(recipe: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Training without a launcher, finished."""
    return run_command(sys.executable, TRAIN, "--config", str(recipe), *words, **environment)


def train(processes: int, recipe: Path, *words: str) -> subprocess.CompletedProcess:
    """Training under `accelerate launch`, finished."""
    return launch(processes, TRAIN, "--config", str(recipe), *words)


@contextmanager
def started(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, which is killed when the test leaves the block."""
    environment = clean_environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    defaults = {"env": environment, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **defaults | options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], object], timeout: float = TIMEOUT, interval: float = 0.05) -> None:
    """Blocks until the condition is true; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"still not so after {timeout} s"
        time.sleep(interval)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ranks_of(launcher: subprocess.Popen | psutil.Process) -> list[psutil.Process]:
    """The training processes below a launcher."""
    return [child for child in psutil.Process(launcher.pid).children() if "train.py" in " ".join(child.cmdline())]
