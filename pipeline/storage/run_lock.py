"""The lock of a run folder: one process writes to it at a time."""

import errno
import logging
from pathlib import Path

from shard_data.file_lock import FileLock, LockHeld
from shard_data.progress import advance

log = logging.getLogger("pipeline")


class RunFolderLost(Exception):
    """The run folder was moved, deleted or taken over while this process wrote to it. Training must end: neither a
    fault of the disk, which it would tolerate, nor an end that may be noted in that folder.
    """


class RunLock:
    """Holds a run folder for one process; the kernel releases it when the process ends, however it ends.

    A context manager. Waits up to `timeout` seconds for another process: after a kill, the processes of the last
    attempt take a few seconds to end. Raises ValueError where the folder is held longer, or cannot be made or written.
    """

    def __init__(self, folder: Path | str, timeout: float = 0.0):
        self.folder = Path(folder)
        self._lock = FileLock(self.folder / "run.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout, lambda holder: log.info(WAITING, self.folder, holder, timeout), advance)
        except LockHeld as error:
            advice = "wait for it, stop it, or name another with --run-dir"
            raise ValueError(f"{self.folder} is in use by {error.holder}; {advice}") from None
        except OSError as error:
            raise ValueError(_problem(self.folder, error)) from error

    def check(self) -> None:
        """Raises RunFolderLost where `run.lock` is no longer the file that was locked: another process may have locked
        the new one. A temporary error of the file system is not that.
        """
        try:
            current = self._lock.is_current()
        except OSError as error:
            log.warning("%s could not be checked: %s", self._lock.path, error.strerror)
            return
        if not current:
            raise RunFolderLost(
                f"{self.folder} was moved or deleted, or its run.lock was replaced, while this process was training in "
                "it; training ends, so that no two processes write to one run. To continue a run that was moved, give "
                "its new place with --run-dir"
            )

    def release(self) -> None:
        """Release the lock. The file stays."""
        self._lock.release()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def is_held(folder: Path) -> bool | None:
    """Whether a process holds the run folder. None where this host cannot say."""
    return FileLock(folder / "run.lock").is_held()


WAITING = "%s is in use by %s: waiting up to %g s"


def _problem(folder: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return f"{folder / 'run.lock'} is a symbolic link, which is refused; remove it"
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return f"{folder} cannot be locked ({error.strerror}); choose a --run-dir on a file system with flock"
    return f"run folder {folder} cannot be written: {error.strerror}; name another with --run-dir"
