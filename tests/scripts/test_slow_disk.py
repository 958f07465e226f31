"""Checkpoints on a disk that is slow or hangs: training on two processes with short timeouts."""

import re
import subprocess

import pytest

from pipeline.distributed.watchdog import STALLED
from pipeline.storage.status import read_status
from tests.helpers.launching import launch_command, run_command
from tests.helpers.recipes import write_tiny_recipe

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, time
from pathlib import Path
from pipeline.storage import checkpoint
from pipeline.train import main
from shard_data import progress

write = checkpoint.write_folder

def write_slowly(folder, *rest):
    for _ in range(10):
        time.sleep(1)
        progress.advance()
    if "--hang" in sys.argv and "00000006" in folder.name:
        time.sleep(1000)
    write(folder, *rest)

checkpoint.write_folder = write_slowly
sys.exit(main([argument for argument in sys.argv[1:] if argument != "--hang"]))
"""


@pytest.fixture
def train(tmp_path, tiny_set):
    """(arguments) -> training of 6 steps with a checkpoint every 3, finished."""
    timeouts = {"collective_timeout": 6.0, "progress_timeout": 8.0}
    rare = {"validation": {"every": 0}, "samples": {"every": 0}, "checkpoint": {"every": 3}}
    recipe = write_tiny_recipe(tmp_path, tiny_set, train=timeouts, **rare)
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        run_dir = ["--config", str(recipe), "--run-dir", str(tmp_path / "run")]
        return run_command(*launch_command(2, tmp_path / "script.py", *run_dir, *arguments), OMP_NUM_THREADS="1")

    return run


def test_training_waits_for_a_slow_disk(tmp_path, train):
    """A checkpoint takes longer than each timeout; the next one waits for it, and so does the other rank."""
    result = train()
    assert result.returncode == 0, result.stderr
    assert read_status(tmp_path / "run").state == "finished"


def test_a_disk_that_hangs_ends_the_run(tmp_path, train):
    result = train("--hang")
    line = rf"^rank 0 on \S+ made no progress in writing a checkpoint to {tmp_path}/run/checkpoints for \d+ s .*$"
    assert len(re.findall(line, result.stderr, re.MULTILINE)) == 1, result.stderr
    assert result.stderr.count(f"exitcode  : {STALLED} ") == 2
