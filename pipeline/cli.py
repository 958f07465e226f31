"""What the command-line tools have in common: how they end, and how they start each other."""

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
    """Exit codes: 0 done, 2 something the user can mend, told in one message, 130 interrupted by Ctrl-C."""
    start_logging(None, is_main=True)
    try:
        work()
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_python(*words: str) -> None:
    """`python WORDS` in a process of its own, from this project. Raises ValueError where it fails, which says why."""
    ended = subprocess.run([sys.executable, *words], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    if ended.returncode != 0:
        raise ValueError(f"`python {shlex.join(words)}` ended with exit code {ended.returncode}; see above")
