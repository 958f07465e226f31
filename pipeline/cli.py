"""Shared by the command-line tools: exit codes, error messages, and starting other tools."""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.distributed.logs import start_logging

log = logging.getLogger("pipeline")
ROOT = Path(__file__).resolve().parents[1]


def run_tool(work: Callable[[], None]) -> int:
    """Exit codes: 0 done, 2 user error, reported in one message, 130 interrupted by Ctrl-C."""
    start_logging(None, is_main=True)
    try:
        work()
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_python(*arguments: str) -> None:
    """Runs `python ARGUMENTS` in a new process, with this project on its path. Raises ValueError if it fails."""
    ended = subprocess.run([sys.executable, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    if ended.returncode != 0:
        raise ValueError(f"`python {shlex.join(arguments)}` ended with exit code {ended.returncode}; see above")
