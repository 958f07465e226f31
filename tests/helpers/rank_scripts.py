"""Short scripts that real ranks run under `accelerate launch`, with a collective timeout of 3 seconds."""

import subprocess
from pathlib import Path

from tests.helpers.launching import ROOT, TIMEOUT, launch_command, run_command, wait_until

BEGINNING = """
import logging, os, sys, time, signal
from pathlib import Path
import torch
from pipeline.distributed.logs import start_logging
from pipeline.distributed.runtime import Runtime
folder = Path(sys.argv[1])
start_logging(os.environ.get("RANK", "0") == "0")
runtime = Runtime(collective_timeout=3.0, progress_timeout=PROGRESS_TIMEOUT)
runtime.watchdog.stacks = folder / "stacks"
def train(at_step=lambda step: None):
    for step in range(10**9):
        runtime.sum(torch.ones(2))
        time.sleep(0.01)
        if step == 10:
            (folder / f"{runtime.rank}.pid").write_text(str(os.getpid()))
            at_step(step)
"""


def write_script(folder: Path, body: str, progress_timeout: float = 600.0) -> Path:
    """A script that defines `train`, which never ends, and then runs `body`."""
    path = folder / "script.py"
    path.write_text(BEGINNING.replace("PROGRESS_TIMEOUT", str(progress_timeout)) + body)
    return path


def script_command(processes: int, script: Path) -> list[str]:
    return launch_command(processes, script, str(script.parent))


def run_script(processes: int, script: Path) -> subprocess.CompletedProcess:
    """The finished launcher, with its output as text."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return run_command(*script_command(processes, script), timeout=TIMEOUT, **variables)


def pid_of(folder: Path, rank: int) -> int:
    """The process id of a rank, once it trains."""
    file = folder / f"{rank}.pid"
    wait_until(lambda: file.exists() and file.read_text())
    return int(file.read_text())
