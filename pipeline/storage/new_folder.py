"""Folders that are complete or absent."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.storage.checkpoint_folder import sync_folder


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The path of a hidden folder to make and fill, which becomes `path` in one rename, and vanishes if that fails.

    Raises ValueError where `path` is there and is not an empty folder, and OSError, which names it, where it cannot be
    written. What a killed process of this host has left is removed.
    """
    path = Path(os.path.abspath(path))
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    hidden = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.writing")
    try:
        yield hidden
        sync_folder(hidden)
        os.rename(hidden, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def check_new(path: Path) -> None:
    """Raises ValueError where `path` is there and is not an empty folder, or where it cannot be made."""
    if not os.path.lexists(path):
        parent = next(parent for parent in Path(os.path.abspath(path)).parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ValueError(f"{path} cannot be made, as {parent} cannot be written to; name another place")
        return
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"{path} is there and is not a folder; name a new folder")
    if any(path.iterdir()):
        raise ValueError(f"{path} is not empty; name a new folder, or remove it")


def _remove_leftovers(path: Path) -> None:
    """Hidden folders of this name whose process has ended. Those of other hosts stay: they may be in use."""
    pattern = re.compile(re.escape(f".{path.name}.{socket.gethostname()}.") + r"(\d+)\.writing")
    for entry in os.scandir(path.parent):
        match = pattern.fullmatch(entry.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(entry.path, ignore_errors=True)
