"""Counts how far long work is: bytes hashed, fetched or written, images converted.

`advance` is called for each piece of such work. A process whose count stands still for long is hanging. A program that
was started by another one with a pipe in the environment variable NVAE_PROGRESS_FD also writes a byte there.
"""

import os
import stat
from contextlib import suppress

VARIABLE = "NVAE_PROGRESS_FD"

_count = 0


def advance() -> None:
    """A piece of work is done."""
    global _count
    _count += 1
    if _pipe is not None:
        with suppress(OSError):  # the pipe is full, or nobody reads it any more
            os.write(_pipe, b".")


def count() -> int:
    """Pieces done by this process so far."""
    return _count


def is_watched() -> bool:
    """Whether another program started this one and waits for it: then it says what comes next."""
    return _pipe is not None


def _take_pipe() -> int | None:
    """The starter's pipe. Programs that this one starts do not inherit it."""
    descriptor = os.environ.pop(VARIABLE, "")
    with suppress(OSError, ValueError):
        if stat.S_ISFIFO(os.fstat(int(descriptor)).st_mode):
            os.set_inheritable(int(descriptor), False)
            os.set_blocking(int(descriptor), False)
            return int(descriptor)
    return None


_pipe = _take_pipe()
