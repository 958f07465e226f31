"""Files that are complete or absent, and bounded reads of files that another user may have prepared."""

import contextlib
import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shard_data.progress import advance

PARTIAL = ".partial"
CHUNK = 2**22
"""Bytes that are read at a time."""


@contextlib.contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """A file to write. It gets its name in one rename when all of it is on the disk, and is deleted if writing fails.

    One process writes a file at a time, or one of each `writer`, whose name is part of the unfinished file's.
    """
    partial = path.with_name(f"{path.name}.{writer}{PARTIAL}" if writer else f"{path.name}{PARTIAL}")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:  # a new file: a symbolic link of this name is not followed
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Put the folder's own entries (renames, deletions) on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_regular(path: Path, follow: bool = False) -> Iterator[BinaryIO]:
    """Open a regular file for reading. Raises OSError for a folder, a pipe or a device, and for a symbolic link unless
    `follow`; its `strerror` says so.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "is a symbolic link, which is refused", str(path)) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        code, problem = (errno.EISDIR, "is a folder") if stat.S_ISDIR(mode) else (errno.EINVAL, "not a regular file")
        raise OSError(code, problem, str(path))
    with open(descriptor, "rb") as file:
        yield file


def read_bounded(path: Path, max_bytes: int, follow: bool = False) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises OSError as `open_regular` does, or for its size."""
    with open_regular(path, follow) as file:
        if os.fstat(file.fileno()).st_size <= max_bytes:  # before anything is read, as a file can be sparse
            content = io.BytesIO()
            while chunk := file.read(min(CHUNK, max_bytes + 1 - content.tell())):
                content.write(chunk)
                advance()
            if content.tell() <= max_bytes:
                return content.getvalue()
    raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", str(path))


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a regular file, through symbolic links. Raises OSError for a pipe or a device."""
    digest = hashlib.sha256()
    with open_regular(path, follow=True) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance()
    return digest.hexdigest()
