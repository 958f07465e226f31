"""Reading files at known offsets. A fault of the system, such as EIO or EMFILE, is no property of the file: it is
retried, and then ends the run with an error that names it.

Files are read instead of memory-mapped: an I/O error in a mapped file, or its truncation, kills the process (SIGBUS).
"""

import errno
import hashlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from shard_data import progress

RETRY_PAUSES = (0.5, 1.5, 5.0)
"""Seconds before each further try after a fault."""

MISSING = {errno.ENOENT, errno.ENOTDIR}
TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
CHUNK = 2**20  # bytes that are hashed at once

Result = TypeVar("Result")
log = logging.getLogger("pipeline")


class MissingFile(ValueError):
    """There is no such file."""


class ShortFile(ValueError):
    """A file ends before what is to be read."""


class OpenFile:
    """A file that is open for reading until the object is deleted. Its methods raise OSError for faults of the system;
    use it inside `retried`.
    """

    def __init__(self, path: Path):
        """Raises MissingFile."""
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in MISSING:
                raise MissingFile(error.strerror) from None
            raise
        weakref.finalize(self, os.close, self._descriptor)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> np.ndarray:
        """The bytes (size,) uint8 from `offset` on. Raises ShortFile."""
        out = np.empty(size, np.uint8)
        self.read_all([[out]], [offset], size)
        return out

    def read_all(self, records: Iterable[list[np.ndarray]], offsets: list[int], size: int) -> None:
        """Fills each record, a list of arrays of together `size` bytes, from its offset on. Raises ShortFile."""
        descriptor, read = self._descriptor, os.preadv
        for record, offset in zip(records, offsets, strict=True):
            if read(descriptor, record, offset) != size:
                self._read_in_pieces(record, offset)
            progress.advance()

    def _read_in_pieces(self, record: list[np.ndarray], offset: int) -> None:
        """A network file system may give less than was wanted."""
        for part in record:
            while len(part):
                received = os.preadv(self._descriptor, [part], offset)
                if not received:
                    raise ShortFile(f"the file has {self.size()} bytes")
                part, offset = part[received:], offset + received

    def sha256(self) -> str:
        """Of the whole file."""
        digest, buffer, offset = hashlib.sha256(), np.empty(CHUNK, np.uint8), 0
        while received := os.preadv(self._descriptor, [buffer], offset):
            digest.update(buffer[:received])
            offset += received
            progress.advance()
        return digest.hexdigest()


def raise_fault(error: Exception) -> None:
    """Raises the error of a decoder again if it is a fault of the system: one that imports a module as it needs it may
    lack a file descriptor.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def retried(path: Path, read: Callable[[], Result], before_retry: Callable[[], None]) -> Result:
    """`read()`, which reads the file at `path` and is tried again after a fault of the system. `before_retry` closes
    the files that may have caused it. Raises OSError with the file and the fault when the last try fails too.
    """
    for pause in (*RETRY_PAUSES, None):
        try:
            return read()
        except (OSError, MemoryError) as error:
            fault = getattr(error, "errno", None) or errno.ENOMEM
        if pause is None:
            break
        log.warning("%s: %s; tried again in %g s", path, os.strerror(fault), pause)
        before_retry()
        time.sleep(pause)
    fix = "; raise the limit of open files (ulimit -n)" if fault in TOO_MANY_FILES else ""
    tries = f"{len(RETRY_PAUSES) + 1} times in {sum(RETRY_PAUSES):g} s"
    raise OSError(fault, f"{os.strerror(fault)} ({errno.errorcode[fault]}), {tries}{fix}", str(path))
