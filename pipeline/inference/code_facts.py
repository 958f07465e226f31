"""Which code computed a figure."""

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.distributed.agreement import PACKAGE, code_version

SECONDS = 20
"""That git may take."""


@cache
def code_facts() -> dict[str, Any]:
    """The sha256 over this package's sources; the commit of its repository and whether files differ from it (None
    outside of a repository); versions of Python and of the libraries that compute.
    """
    root = PACKAGE.parent
    commit, status = None, None
    if git(root, "rev-parse", "--show-toplevel") == str(root.resolve()):  # and not a repository around an installation
        commit, status = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "version": code_version(),
        "commit": commit,
        "dirty": None if status is None else bool(status),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints, without the last newline; None where there is no git, or it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return ended.stdout.strip()
