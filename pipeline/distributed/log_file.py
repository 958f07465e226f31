"""The log file of a run."""

import logging
import os
from pathlib import Path

log = logging.getLogger("pipeline")


class LogFile(logging.Handler):
    """Keeps records in memory until `open` is given the file, then appends each of them with one write.

    A file that cannot be written (full disk) does not end the program: a warning says so once, and the lines are
    written as soon as that is possible again.
    """

    def __init__(self):
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._path: Path | None = None
        self._descriptor: int | None = None
        self._unwritten = b""
        self._failing = False

    def open(self, path: Path) -> None:
        """Append to this file from now on, the records so far included."""
        self._path = path
        with self.lock:
            self._write()

    def emit(self, record: logging.LogRecord) -> None:
        self._unwritten += f"{self.format(record)}\n".encode(errors="replace")
        if self._path is not None:
            self._write()

    def close(self) -> None:
        super().close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._path = self._descriptor = None

    def _write(self) -> None:
        fault = self._try_to_write()
        reported, self._failing = self._failing, fault is not None
        if fault is not None and not reported:
            log.warning("%s: %s; its lines are kept in memory until they can be written", self._path, fault)

    def _try_to_write(self) -> str | None:
        """Returns what is wrong."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._unwritten = self._unwritten[os.write(self._descriptor, self._unwritten) :]
        except OSError as error:
            return error.strerror
        return "no space left" if self._unwritten else None
