"""Files that are complete or absent."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name in one rename when all of it is on disk, and vanishes if writing fails.

    Raises OSError, which names `path`, also where its folder does not exist: a run folder that was moved is not made
    again. One process of a host writes a file at a time; hosts that share the folder do not disturb each other.
    """
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a process that died, or a symbolic link, which would be followed
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
