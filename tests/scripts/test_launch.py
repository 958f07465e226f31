"""`pipeline/launch.py`: one line for an error on several processes, and the command's exit code. Real processes."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.launch import main
from tests.helpers.launching import ROOT, TIMEOUT, TRAIN, run_command

LAUNCH = str(ROOT / "pipeline" / "launch.py")


def launch(processes: int, script: Path | str, *arguments: str) -> subprocess.CompletedProcess:
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml")
    port = ["--main_process_port", "0"] if processes > 1 else []
    command = [sys.executable, LAUNCH, "--config_file", str(config), *port, str(script), *arguments]
    return run_command(*command, timeout=TIMEOUT, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def test_a_mistyped_setting_gives_one_line():
    result = launch(2, TRAIN, "--model", "nvae", "optim.lr=fast")
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*optim\.lr: .*\n", result.stderr), result.stderr
    assert result.stdout == ""


def test_options_that_accelerate_refuses_give_one_line(capsys):
    assert main(["--multi_gpu", "--cpu", TRAIN]) == 2
    assert re.fullmatch(r"error: You can only use one of .*\n", capsys.readouterr().err)


BEGINNING = """
import os, sys, time, signal
from pipeline.cli import run_tool
from pipeline.distributed import logs
rank = int(os.environ.get("RANK", "0"))
"""

SLOW_MAIN = """
def work():
    time.sleep(0 if rank else 3)
    raise ValueError(f"spoiled on {rank}")
sys.exit(run_tool(work))
"""

ONE_RANK = """
logs.REPORT_DELAY = 1
def work():
    if rank == 1:
        raise ValueError("spoiled")
    time.sleep(1000)
sys.exit(run_tool(work))
"""

DIVERGES = """
from pipeline.distributed.runtime import Runtime, raised_on_all_ranks
def work():
    runtime = Runtime()
    close = runtime.close
    def close_slowly():
        time.sleep(0 if rank else 4)
        close()
    runtime.close = close_slowly
    with runtime.closing():
        raise raised_on_all_ranks(ArithmeticError("diverged"))
sys.exit(run_tool(work, failures={ArithmeticError: 1}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        pytest.param(SLOW_MAIN, 2, "error: spoiled on 0\n", id="the main process fails last"),
        pytest.param(ONE_RANK, 2, "error on rank 1: spoiled\n", id="another process fails alone"),
        pytest.param(DIVERGES, 1, "error: diverged\n", id="the main process leaves last"),
    ],
)
def test_an_error_is_reported_once_before_the_launcher_ends_the_others(tmp_path, body, code, message):
    script = tmp_path / "script.py"
    script.write_text(BEGINNING + body)
    result = launch(2, script)
    assert result.returncode == code
    lines = [line for line in result.stderr.splitlines(True) if not re.fullmatch(r"rank . .* exit code 1\n", line)]
    assert "".join(lines) == message


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "line"), [(1, ""), (2, r"rank 1 \(process \d+\) was killed by SIGKILL\n")])
def test_a_killed_process_is_named(tmp_path, processes, line):
    script = tmp_path / "script.py"
    script.write_text(
        f"{BEGINNING}\nif rank == {processes - 1}:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(1000)"
    )
    result = launch(processes, script)
    assert result.returncode == (-signal.SIGKILL if processes == 1 else 128 + signal.SIGKILL)
    assert re.fullmatch(line, result.stderr)
