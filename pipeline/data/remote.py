"""Shard sets behind an http(s) address: fetched into a cache folder before training begins, then read like any other.

All processes of a node share the cache. The process that gets a file's lock fetches it. A file gets its name when its
size and hash are the manifest's, so a file with that name is complete, and an interrupted fetch resumes with the next
missing file. The server is untrusted: the manifest limits how many bytes are taken. So is the cache: symbolic links in
it are replaced or refused, never followed.
"""

import contextlib
import hashlib
import io
import logging
import math
import os
import shutil
import stat
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shard_data import manifest as manifests
from shard_data.fetch import Expected, FetchFailed, WrongContent, fetch
from shard_data.file_lock import FileLock, LockHeld
from shard_data.files import PARTIAL, replacing
from shard_data.manifest import Manifest
from shard_data.progress import advance
from shard_data.terminal import BYTES, Progress

MAX_INDEX_HEADER = 2**16

log = logging.getLogger("pipeline")


class FetchError(ValueError):
    """A set that cannot be fetched. The message names the address and what to do."""


class RemoteFile(NamedTuple):
    """A file to be fetched from `address`, and what it has to be."""

    address: str
    name: str
    sha256: str
    size: int | None
    """Bytes; None where only the limit is known."""
    limit: int


def is_address(root: str) -> bool:
    """Whether a root is an address rather than a folder."""
    return "://" in root


def check_address(root: str) -> str:
    """The address of a set without a slash at its end. Raises ValueError for one that cannot be used."""
    parts = urllib.parse.urlsplit(root)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"data.root: {parts.scheme}: only http:// and https:// addresses are fetched; or name a folder"
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            f"data.root: the address of a set on {parts.hostname} is that of a folder, without name, password, ? or #; "
            "copy a set that needs them to a folder"
        )
    return root.rstrip("/")


def default_cache() -> Path:
    """The folder of fetched sets: the environment variable NVAE_CACHE_DIR, or ~/.cache/nvae-pipeline."""
    return Path(os.environ.get("NVAE_CACHE_DIR") or Path.home() / ".cache" / "nvae-pipeline")


def fetch_manifest(address: str) -> bytes:
    """The content of ADDRESS/manifest.json. Raises FetchError, or ValueError where it is not a manifest."""
    place = f"{address}/{manifests.FILE}"
    content = io.BytesIO()
    _fetch(place, content, Expected(manifests.MAX_BYTES))
    manifests.parse(content.getvalue(), place)
    return content.getvalue()


def fetch_set(address: str, manifest: bytes, splits: Sequence[str], cache: Path, progress: bool = False) -> Path:
    """Fetch the missing files of these splits. Returns the folder of the set, in `cache`.

    The folder is named after the manifest's bytes, so that a set which changes at its address is fetched again. Any
    number of processes may call it at once. `progress` shows a bar. Raises FetchError, or OSError where the cache
    cannot be written.
    """
    files = remote_files(address, manifests.parse(manifest, f"{address}/{manifests.FILE}"), splits)
    folder = _own_folder(cache / hashlib.sha256(manifest).hexdigest()[:32])
    missing = [file for file in files if not _is_there(folder, file)]
    if missing:
        _check_space(folder, missing)
        log.info("fetching %d files of %s into %s", len(missing), address, folder)
        _fetch_all(folder, missing, progress)
    lock = FileLock(folder / f"{manifests.FILE}.lock")
    with lock.acquire(math.inf), replacing(folder / manifests.FILE) as file:
        file.write(manifest)
    return folder


def remote_files(address: str, manifest: Manifest, splits: Sequence[str]) -> list[RemoteFile]:
    """The shards and indexes of these splits, without repetition. Raises ValueError for a split that is not there."""
    files = []
    for split in dict.fromkeys(splits):
        if split not in manifest["splits"]:
            raise ValueError(f"{address}: no split '{split}'; it has: {', '.join(manifest['splits'])}")
        for shard in manifest["splits"][split]["shards"]:
            tar, index, size = shard["file"], shard["index"], shard["bytes"]
            limit = MAX_INDEX_HEADER + manifests.MIN_SAMPLE_BYTES * shard["count"]  # no manifest has the exact size
            files.append(RemoteFile(f"{address}/{tar}", tar, shard["sha256"], size, size))
            files.append(RemoteFile(f"{address}/{index}", index, shard["index_sha256"], None, limit))
    return files


def _own_folder(folder: Path) -> Path:
    if folder.is_symlink():
        raise FetchError(f"{folder}: is a symbolic link, which is refused; delete it, or set another data.cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_there(folder: Path, file: RemoteFile) -> bool:
    try:
        found = (folder / file.name).lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and file.size in (None, found.st_size) and found.st_size <= file.limit


def _check_space(folder: Path, missing: list[RemoteFile]) -> None:
    needed, free = sum(file.size or 0 for file in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{folder}: {needed / 2**30:,.1f} GiB are to be fetched and {free / 2**30:,.1f} are free; "
            "free some space, or set another folder with data.cache"
        )


def _fetch_all(folder: Path, missing: list[RemoteFile], progress: bool) -> None:
    """In the first round a process takes what nobody is fetching; in the second it waits for what others fetch."""
    total = sum(file.size or 0 for file in missing)
    with Progress("fetch", total, BYTES, write=log.info, shown=progress) as bar:
        for wait in (0.0, math.inf):
            for file in list(missing):
                lock, growth = FileLock(folder / f"{file.name}.lock"), _Growth(folder / file.name)
                with contextlib.suppress(LockHeld), lock.acquire(wait, _log_wait, growth.look):
                    _fetch_file(folder, file)
                    missing.remove(file)
                    bar.update(file.size or 0)


def _log_wait(holder: str) -> None:
    log.info("waiting for the files that %s fetches", holder)


class _Growth:
    """Counts as progress what another process writes of a file."""

    def __init__(self, path: Path):
        self._partial, self._size = path.with_name(path.name + PARTIAL), 0

    def look(self) -> None:
        """Compare the size with the last one."""
        with contextlib.suppress(FileNotFoundError):
            before, self._size = self._size, self._partial.stat().st_size
            if self._size != before:
                advance()


def _fetch_file(folder: Path, file: RemoteFile) -> None:
    if _is_there(folder, file):  # since another process had the lock
        return
    with replacing(folder / file.name) as target:
        _fetch(file.address, target, Expected(file.limit, file.size, "sha256", file.sha256))


def _fetch(address: str, target: BinaryIO, expected: Expected) -> None:
    try:
        fetch(address, target, expected)
    except WrongContent as error:
        raise FetchError(
            f"{error}; the file is corrupt, or the set was changed while it was fetched: run the command again, and if "
            "that does not help, copy the set there again and check it there with: python -m shard_data verify"
        ) from None
    except FetchFailed as error:
        raise FetchError(
            f"{error}; is the server up, and data.root the address of a complete shard set (the folder that holds "
            f"{manifests.FILE})? The same command resumes where this one stopped"
        ) from None
