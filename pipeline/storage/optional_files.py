"""Files that a run can do without: where one cannot be written, training continues."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("pipeline")


class OptionalFiles:
    """Tolerates OSError (full disk, quota, I/O error, permissions). The first of each kind of file is logged."""

    def __init__(self):
        self._reported: set[str] = set()

    @contextmanager
    def writing(self, kind: str, path: Path) -> Iterator[None]:
        """Use around the writing of `path`. `kind`: for instance "pictures"."""
        try:
            yield
        except OSError as error:
            if kind not in self._reported:
                log.warning(
                    "%s could not be written: %s. Training continues; from now on, %s that cannot be written are "
                    "skipped without a message.",
                    path,
                    error.strerror or error,
                    kind,
                )
            self._reported.add(kind)


def append_lines(path: Path, lines: str) -> None:
    """Appends complete lines, all of them or none. Raises OSError."""
    content = lines.encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise
