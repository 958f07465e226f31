"""Files that are complete or absent, on a disk that several hosts may share."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shard_data.files import replacing


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name in one rename when all of it is on disk, and vanishes if writing fails.

    Raises OSError, which names `path`, also where its folder does not exist: a run folder that was moved is not made
    again. One process of a host writes a file at a time; hosts that share the folder do not disturb each other.
    """
    try:
        with replacing(path, socket.gethostname()) as file:
            yield file
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
