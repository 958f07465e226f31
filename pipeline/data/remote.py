"""Shard sets behind an http(s) address: fetched into a cache folder before training begins, then read like any other.

All processes of a node share the cache. A file is fetched by the one that gets its lock, and takes its name when its
size and hash are the manifest's, so whatever has its name is whole, and an interrupted fetch goes on by the file.
Nobody is trusted: the manifest says how many bytes are taken, and names files of one folder only.
"""

import contextlib
import hashlib
import io
import logging
import math
import os
import shutil
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from pipeline.data.manifest import FILE_NAME, Manifest, parse_manifest
from pipeline.storage.atomic import replacing
from shard_data.fetch import Expected, FetchFailed, WrongContent, fetch
from shard_data.file_lock import FileLock, LockHeld

MAX_MANIFEST_BYTES = 2**26
MAX_INDEX_HEADER = 2**16
MIN_SAMPLE_BYTES = 2**10
"""Of a sample in a tar: a header and a block. An index, whose size no manifest tells, has less for each."""

log = logging.getLogger("pipeline")


class FetchError(ValueError):
    """A set that cannot be fetched. The message names the address and the remedy."""


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
    """The text of ADDRESS/manifest.json. Raises FetchError, or ValueError where it is no manifest."""
    place = f"{address}/{FILE_NAME}"
    content = io.BytesIO()
    _fetch(place, content, Expected(MAX_MANIFEST_BYTES))
    parse_manifest(content.getvalue(), place)
    return content.getvalue()


def fetch_set(address: str, manifest: bytes, splits: Sequence[str], cache: Path, progress: bool = False) -> Path:
    """Fetch what is missing of these splits; the folder in which the set lies then, in `cache`.

    The folder is named after the manifest's bytes, so that a set which changes at its address is fetched anew. Any
    number of processes may call it at once. `progress` shows a bar. Raises FetchError, or OSError where the cache
    cannot be written.
    """
    files = remote_files(address, parse_manifest(manifest, f"{address}/{FILE_NAME}"), splits)
    folder = cache / hashlib.sha256(manifest).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not _is_there(folder, file)]
    if missing:
        _check_room(folder, missing)
        log.info("fetching %d files of %s into %s", len(missing), address, folder)
        _fetch_all(folder, missing, progress)
    with FileLock(folder / f"{FILE_NAME}.lock").acquire(math.inf), replacing(folder / FILE_NAME) as file:
        file.write(manifest)
    return folder


def remote_files(address: str, manifest: Manifest, splits: Sequence[str]) -> list[RemoteFile]:
    """The shards and indexes of these splits, without repetition. Raises ValueError for a split that is not there, and
    FetchError for names and counts that no shard set has.
    """
    files = {}
    for split in dict.fromkeys(splits):
        if split not in manifest.splits:
            raise ValueError(f"{address}: no split '{split}'; it has: {', '.join(manifest.splits)}")
        for shard in manifest.splits[split].shards:
            place = f"{address}/{shard.file}"
            files[shard.file] = RemoteFile(place, shard.file, shard.sha256, shard.bytes, shard.bytes)
            limit = MAX_INDEX_HEADER + MIN_SAMPLE_BYTES * shard.count
            if shard.count * MIN_SAMPLE_BYTES > shard.bytes:
                raise FetchError(f"{place}: {shard.count} samples in {shard.bytes} bytes; do not use this set")
            files[shard.index] = RemoteFile(f"{address}/{shard.index}", shard.index, shard.index_sha256, None, limit)
    odd = [name for name in files if not name.endswith((".tar", ".index.npy"))]
    if odd or len(files) != 2 * sum(len(manifest.splits[split].shards) for split in dict.fromkeys(splits)):
        raise FetchError(f"{address}/{FILE_NAME}: names {odd[0] if odd else 'a file twice'}; do not use this set")
    return list(files.values())


def _is_there(folder: Path, file: RemoteFile) -> bool:
    try:
        size = (folder / file.name).stat().st_size
    except FileNotFoundError:
        return False
    return file.size in (None, size)


def _check_room(folder: Path, missing: list[RemoteFile]) -> None:
    wanted, free = sum(file.size or 0 for file in missing), shutil.disk_usage(folder).free
    if wanted > free:
        raise FetchError(
            f"{folder}: {wanted / 2**30:,.1f} GiB are to be fetched and {free / 2**30:,.1f} are free; "
            "make room, or name another folder with data.cache"
        )


def _fetch_all(folder: Path, missing: list[RemoteFile], progress: bool) -> None:
    """In the first round processes take what nobody is fetching; in the second each waits for what others fetch."""
    total = sum(file.size or 0 for file in missing)
    with tqdm(total=total, desc="fetch", unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for wait in (0.0, math.inf):
            for file in list(missing):
                with contextlib.suppress(LockHeld), FileLock(folder / f"{file.name}.lock").acquire(wait, _log_wait):
                    _fetch_file(folder, file)
                    missing.remove(file)
                    bar.update(file.size or 0)


def _log_wait(holder: str) -> None:
    log.info("waiting for the files that %s fetches", holder)


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
            f"{error}; the file is corrupt or belongs to another set: copy the set there again, and check it there "
            "with: python -m shard_data verify"
        ) from None
    except FetchFailed as error:
        raise FetchError(
            f"{error}; is the server up, and data.root the address of a complete shard set (the folder that holds "
            f"{FILE_NAME})? The same command resumes where this one stopped"
        ) from None
