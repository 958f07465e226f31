"""The lock of a run folder: two writers never meet."""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

log = logging.getLogger("pipeline")

BETWEEN_TRIES = 0.5


class RunLock:
    """Holds a run folder for one process; the kernel lets go when the process ends, however it ends.

    A context manager. Where another process holds the folder, waits up to `patience` seconds for it: after a kill, the
    processes of the last attempt take a few seconds to end. Raises ValueError where it is held longer, or where it
    cannot be made or written.
    """

    def __init__(self, folder: Path | str, patience: float = 0.0):
        self.path = Path(folder) / "run.lock"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+")  # noqa: SIM115 - stays open as long as the lock is held
        except OSError as error:
            raise ValueError(
                f"run folder {folder} cannot be written: {error.strerror}; name another with --run-dir"
            ) from error
        try:
            self._take(patience)
        except BaseException:
            self._file.close()
            raise
        self._sign()
        # A forked loader worker would share the lock and keep it after this process died.
        os.register_at_fork(after_in_child=self._file.close)

    def _take(self, patience: float) -> None:
        end, told = time.monotonic() + patience, False
        while not self._try():
            if time.monotonic() >= end:
                raise ValueError(
                    f"{self.path.parent} is in use by {self._holder()}; wait for it, stop it, or name another with "
                    "--run-dir"
                )
            if not told:
                log.info("%s is in use by %s: waiting up to %g s", self.path.parent, self._holder(), patience)
                told = True
            time.sleep(BETWEEN_TRIES)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                return False
            fault = f"{self.path.parent} cannot be locked ({error.strerror})"
            raise ValueError(f"{fault}; choose a --run-dir on a file system with flock") from error
        return True

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read().strip() or "another process"

    def _sign(self) -> None:
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let go. The file stays: deleting it would let two processes lock two files of one name."""
        self._file.close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
