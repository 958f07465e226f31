"""Shard sets behind an http(s) address: fetched into a cache folder before training begins, then read like any other.

All processes of a node share the cache. A file is fetched by the one that gets its lock, and takes its name when its
size and hash are the manifest's, so whatever has its name is whole, and an interrupted fetch goes on by the file.
Nobody is trusted: the manifest says how many bytes are taken, and names files of one folder only.
"""

import contextlib
import fcntl
import functools
import hashlib
import http.client
import io
import logging
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from pipeline.data.manifest import FILE_NAME, Manifest, parse_manifest
from pipeline.storage.atomic import replacing

ATTEMPTS = 4
FIRST_WAIT = 1.0
"""Seconds before the second attempt; each later wait is twice as long."""
TIMEOUT = 30.0
"""Seconds to connect, and to wait for more bytes."""
SLOWEST = 2**16
"""Bytes per second that an answer must reach on the whole, after the first TIMEOUT seconds."""
CHUNK = 2**20
MAX_MANIFEST_BYTES = 2**26
MAX_INDEX_HEADER = 2**16
MIN_SAMPLE_BYTES = 2**10
"""Of a sample in a tar: a header and a block. An index, whose size no manifest tells, has less for each."""
PASSING_CODES = (408, 425, 429, 500, 502, 503, 504)

log = logging.getLogger("pipeline")


class FetchError(ValueError):
    """A set that cannot be fetched. The message names the address and the remedy."""


class _Passing(Exception):
    """A fault that another attempt may not meet."""


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
    _receive(place, None, MAX_MANIFEST_BYTES, content)
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
    with _locked(folder / f"{FILE_NAME}.lock", wait=True), replacing(folder / FILE_NAME) as file:
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
        for wait in (False, True):
            for file in list(missing):
                with _locked(folder / f"{file.name}.lock", wait) as mine:
                    if mine:
                        _fetch_file(folder, file)
                        missing.remove(file)
                        bar.update(file.size or 0)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock is held; the kernel lets go of it when the process ends, however it ends."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _fetch_file(folder: Path, file: RemoteFile) -> None:
    if _is_there(folder, file):  # since another process had the lock
        return
    with replacing(folder / file.name) as target:
        if _receive(file.address, file.size, file.limit, target) != file.sha256:
            raise FetchError(
                f"{file.address}: its sha256 is not the manifest's, so it is damaged or of another set; "
                "copy the set there again, and check it there with: python -m shard_data verify"
            )


def _receive(address: str, size: int | None, limit: int, target: BinaryIO) -> str:
    """Writes the body of the answer, of `size` or at most `limit` bytes, to `target`; its sha256. Tries repeatedly."""
    for number in range(ATTEMPTS):
        target.seek(0)
        target.truncate()
        try:
            return _attempt(address, size, limit, target)
        except _Passing as error:
            fault = error
        if number + 1 < ATTEMPTS:
            log.info("%s: %s; trying again", address, fault)
            time.sleep(FIRST_WAIT * 2**number)
    raise FetchError(
        f"{address}: {fault} ({ATTEMPTS} attempts); is the server up, and data.root its address? "
        "The same command goes on where this one stopped"
    )


def _attempt(address: str, size: int | None, limit: int, target: BinaryIO) -> str:
    deadline = time.monotonic() + TIMEOUT + limit / SLOWEST
    digest, received = hashlib.sha256(), 0
    with contextlib.closing(_open(address)) as answer:
        expected = size if size is not None else answer.length
        if answer.length is not None and (answer.length > limit or answer.length != expected):
            raise _wrong_size(address, f"{answer.length} bytes", size, limit)
        while chunk := _next_chunk(answer):
            received += len(chunk)
            if received > limit:
                raise _wrong_size(address, "more", size, limit)
            if time.monotonic() > deadline:
                raise _Passing(f"slower than {SLOWEST // 1024} KiB/s")
            digest.update(chunk)
            target.write(chunk)
    if expected is not None and received < expected:
        raise _Passing(f"broke off after {received} of {expected} bytes")
    return digest.hexdigest()


def _wrong_size(address: str, found: str, size: int | None, limit: int) -> FetchError:
    allowed = f"the {size} bytes that the manifest says" if size is not None else f"at most {limit} bytes"
    return FetchError(f"{address}: the server sends {found} instead of {allowed}; copy the set there again")


def _open(address: str) -> http.client.HTTPResponse:
    # "identity": a proxy that compresses would change the bytes.
    headers = {"User-Agent": "nvae-pipeline", "Accept-Encoding": "identity"}
    try:
        return _opener().open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"{error.code} {str(error.reason).splitlines()[0] if error.reason else ''}".strip()
        if error.code in PASSING_CODES:
            raise _Passing(f"the server answers {answer}") from None
        raise FetchError(
            f"{address}: the server answers {answer}; is data.root the address of a complete shard set "
            f"(the folder that holds {FILE_NAME})?"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(_reason(error)) from None


def _next_chunk(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read1(CHUNK)  # what is there: a server that trickles is noticed by the deadline
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(_reason(error)) from None


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A few, to http and https alone, and never from https to http."""

    max_redirections = 5

    def redirect_request(self, request, answer, code, message, headers, address):
        """The request that follows, or HTTPError."""
        answer.close()  # urllib would read the body, however long
        if urllib.parse.urlsplit(address).scheme not in ("https", request.type):
            raise urllib.error.HTTPError(address, code, "redirected to another protocol", headers, answer)
        return super().redirect_request(request, answer, code, message, headers, address)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """http and https and nothing else: urllib's own opener also reads file:, ftp: and data: addresses."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _Redirects,
    )
    for handler in handlers:
        opener.add_handler(handler())
    return opener
