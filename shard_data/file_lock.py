"""An exclusive lock on a file, held by one process at a time.

    with FileLock(folder / "run.lock") as lock:             # raises LockHeld when another process holds it
    FileLock(path).acquire(timeout=30, on_wait=log_holder)  # waits for it; the caller keeps the lock and releases it

The lock is flock(2): the kernel releases it when the holder ends, however it ends. A forked child closes its copy of
the file, so that the lock does not outlive the process that took it. The file holds one line, which names the holder:
"process PID on HOST".
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

RETRY_SECONDS = 0.1
HOLDER_BYTES = 1024


class LockHeld(Exception):
    """Another process holds the lock. `holder` names it: "process PID on HOST", or "another process"."""

    def __init__(self, path: Path, holder: str):
        super().__init__(f"{path} is locked by {holder}")
        self.path, self.holder = path, holder


class FileLock:
    """The lock that `path` stands for. The object is not locked until `acquire` is called or a `with` block starts.

    A file that is deleted or replaced no longer is the locked file: `acquire` checks this when it gets the lock, and
    `is_current` tells the holder of a lock whether `path` still is the file that it locked.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._descriptor: int | None = None

    def acquire(
        self,
        timeout: float = 0.0,
        on_wait: Callable[[str], None] | None = None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> "FileLock":
        """Take the lock, and wait at most `timeout` seconds for another holder. `on_wait` is called with the name of
        the holder once, before the wait starts, `while_waiting` ten times per second.

        Raises LockHeld when the lock is held for longer, and OSError when the file cannot be opened (a symbolic link
        is refused: its target would be overwritten) or its file system has no flock.
        """
        assert self._descriptor is None, f"{self.path} is locked already"
        end = time.monotonic() + timeout
        while not self._try_once():
            if time.monotonic() >= end:
                raise LockHeld(self.path, self.holder())
            if on_wait is not None:
                on_wait(self.holder())
                on_wait = None
            while_waiting()
            time.sleep(min(RETRY_SECONDS, max(0.0, end - time.monotonic())))
        return self

    def release(self, delete: bool = False) -> None:
        """Release the lock. `delete` also deletes the file; without it the file stays."""
        if self._descriptor is None:
            return
        if delete and self.is_current():
            self.path.unlink()
        # Unlocked and not only closed: a program that is being started may have the descriptor until its exec.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._close()

    def is_current(self) -> bool:
        """Whether this object holds the lock and `path` still is the file that was locked."""
        return self._descriptor is not None and _same_file(self._descriptor, self.path)

    def holder(self) -> str:
        """Who wrote its name into the file last."""
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            return _printable(file.read(HOLDER_BYTES)) or "another process"
        return "another process"

    def is_held(self) -> bool | None:
        """Whether a process holds the lock. None where this host cannot say: the last holder was on another one, as far
        as is known, or the file cannot be read. Makes no file.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until it is closed: an `acquire` tries again
            holder = _printable(os.pread(descriptor, HOLDER_BYTES, 0))
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return False if holder.endswith(f" on {socket.gethostname()}") else None

    def __enter__(self) -> "FileLock":
        return self if self._descriptor is not None else self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _try_once(self) -> bool:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(descriptor, self.path):
                    break
            except BlockingIOError:
                os.close(descriptor)
                return False
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the file was deleted or replaced between open and flock
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor
        _held.add(self)
        return True

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)


def _printable(content: bytes) -> str:
    """The first line of a lock file."""
    return "".join(filter(str.isprintable, content.decode(errors="replace").strip().partition("\n")[0]))


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


_held: set[FileLock] = set()


def _close_in_child() -> None:
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_close_in_child)
