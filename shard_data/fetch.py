"""Fetches files over http and https. Server responses are untrusted: sizes are bounded and contents are hashed.

Every attempt has one deadline. A timer shuts down its connections when the deadline is over, whatever the server does:
slow headers, endless `100 Continue` answers and slow chunks included. The bytes are hashed as they are sent; nothing is
decompressed.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import logging
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from shard_data.errors import DataError
from shard_data.file_kinds import HEAD, describe_kind
from shard_data.progress import advance

ATTEMPTS = 4
FIRST_WAIT = 1.0
"""Seconds before the second attempt; each later wait is twice as long."""
TIMEOUT = 30.0
"""Seconds until the headers have arrived, redirects included, and without a byte of the body."""
SLOWEST = 2**16
"""Bytes per second that the body must reach on average, after the first TIMEOUT seconds."""
CHUNK = 2**20
TRANSIENT_CODES = (408, 425, 429, 500, 502, 503, 504)

log = logging.getLogger("pipeline")


class FetchFailed(DataError):
    """A file that could not be fetched. `reason` is the message without the address."""

    def __init__(self, address: str, reason: str):
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return f"{self.address}: {self.reason}"


class WrongContent(FetchFailed):
    """The server sent a file of another size or hash."""


class Expected(NamedTuple):
    """What a file has to be."""

    limit: int
    """Bytes that are accepted at most."""
    size: int | None = None
    """Exact number of bytes, where it is known."""
    algorithm: str = "sha256"
    """Of the hash: sha256, or md5 for data sets that publish only that."""
    digest: str | None = None
    """Hexadecimal hash; None for a file that is checked by other means."""


class _Transient(Exception):
    """A fault that another attempt may not have."""


def fetch(
    address: str, target: BinaryIO, expected: Expected, on_bytes: Callable[[int, int | None], None] | None = None
) -> None:
    """Write the file at `address` to `target`, which is empty when an attempt starts.

    `on_bytes` is called with the number of bytes of this attempt so far, and the announced total or None. Raises
    WrongContent for another size or hash, FetchFailed for everything else that the server or the network does.
    """
    for number in range(ATTEMPTS):
        target.seek(0)
        target.truncate()
        try:
            return _attempt(address, target, expected, on_bytes or _ignore)
        except _Transient as error:
            fault = error
        if number + 1 < ATTEMPTS:
            log.info("%s: %s; trying again", address, fault)
            time.sleep(FIRST_WAIT * 2**number)
    raise FetchFailed(address, f"{fault} ({ATTEMPTS} attempts)")


def _ignore(_count: int, _total: int | None) -> None:
    pass


def _attempt(address: str, target: BinaryIO, expected: Expected, on_bytes: Callable) -> None:
    digest, head, received = hashlib.new(expected.algorithm, usedforsecurity=False), b"", 0
    with _Deadline(TIMEOUT) as deadline, contextlib.closing(_open(address, deadline)) as answer:
        deadline.restart(TIMEOUT + expected.limit / SLOWEST)
        total = expected.size if expected.size is not None else answer.length
        if answer.length is not None and (answer.length > expected.limit or answer.length != total):
            raise _wrong_size(address, f"{answer.length} bytes", expected)
        on_bytes(0, total)
        while chunk := _next_chunk(answer, deadline):
            head = head or chunk[:HEAD]
            received += len(chunk)
            if received > expected.limit:
                raise _wrong_size(address, "more", expected)
            digest.update(chunk)
            target.write(chunk)
            advance()
            on_bytes(received, total)
    if total is not None and received < total:
        raise _Transient(f"the connection broke off after {received:,} of {total:,} bytes")
    if expected.digest is not None and digest.hexdigest() != expected.digest:
        found = f"{describe_kind(head)} arrived, with {expected.algorithm} {digest.hexdigest()}"
        raise WrongContent(address, f"{found} instead of {expected.digest}")


def _wrong_size(address: str, found: str, expected: Expected) -> WrongContent:
    allowed = f"{expected.size} bytes" if expected.size is not None else f"at most {expected.limit} bytes"
    return WrongContent(address, f"the server sends {found} instead of {allowed}")


def _open(address: str, deadline: "_Deadline") -> http.client.HTTPResponse:
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise FetchFailed(address, "not an http or https address")
    # "identity": a proxy that compresses would change the bytes.
    headers = {"User-Agent": "nvae-pipeline", "Accept-Encoding": "identity"}
    try:
        return _opener(deadline).open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            answer = f"the server answers {error.code} {http.client.responses.get(error.code, '')}".rstrip()
            if error.code in TRANSIENT_CODES:
                raise _Transient(answer) from None
            raise FetchFailed(address, f"{answer} with {describe_kind(_body_of(error))}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _transient(error, deadline) from None
    except ValueError as error:
        raise FetchFailed(address, f"not an address that can be fetched ({error})") from None


def _body_of(error: urllib.error.HTTPError) -> bytes:
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        return error.read(HEAD)
    return b""


def _next_chunk(answer: http.client.HTTPResponse, deadline: "_Deadline") -> bytes:
    try:
        chunk = answer.read1(CHUNK)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: sizes of chunks that are no numbers
        raise _transient(error, deadline) from None
    if not chunk and deadline.expired:  # a connection that was shut down looks like the end of the body
        raise _transient(TimeoutError(), deadline)
    return chunk


def _transient(error: Exception, deadline: "_Deadline") -> _Transient:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if deadline.expired:
        return _Transient(f"no complete answer within {deadline.seconds:.3g} s")
    if isinstance(cause, TimeoutError):
        return _Transient(f"no answer within {TIMEOUT:g} s")
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return _Transient("".join(filter(str.isprintable, text))[:200])


class _Deadline:
    """Shuts down the connections that it made when its time is over. A context manager."""

    def __init__(self, seconds: float):
        self.expired = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._start(seconds)

    def _start(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def restart(self, seconds: float) -> None:
        """The time is over in `seconds` from now."""
        self._timer.cancel()
        self._start(seconds)

    def connect(self, place: tuple[str, int], timeout: float, _source: object = None) -> socket.socket:
        """As socket.create_connection; the time for all addresses of the host is limited."""
        failure: OSError = OSError(f"{place[0]}: no address found")
        for family, kind, protocol, _, address in socket.getaddrinfo(*place, type=socket.SOCK_STREAM):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(max(0.001, min(timeout, self._end - time.monotonic())))
                connection.connect(address)
                self._watch(connection)
            except OSError as error:
                connection.close()
                failure = error
                continue
            connection.settimeout(timeout)
            return connection
        raise failure

    def _watch(self, connection: socket.socket) -> None:
        with self._lock:
            if self.expired:
                raise TimeoutError
            self._sockets.append(connection.dup())  # TLS takes the socket over before its handshake

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "_Deadline":
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        with self._lock:
            for connection in self._sockets:
                connection.close()
            self._sockets.clear()


def _connection(kind: type, deadline: _Deadline, host: str, **options) -> http.client.HTTPConnection:
    connection = kind(host, **options)
    connection._create_connection = deadline.connect
    return connection


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._kind = functools.partial(_connection, http.client.HTTPConnection, deadline)

    def http_open(self, request):
        return self.do_open(self._kind, request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._kind = functools.partial(_connection, http.client.HTTPSConnection, deadline)

    def https_open(self, request):
        return self.do_open(self._kind, request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """At most five, to http and https alone, and never from https to http."""

    max_redirections = 5

    def redirect_request(self, request, answer, code, message, headers, address):
        """The request that follows, or HTTPError."""
        answer.close()  # urllib would read the body, however long
        if urllib.parse.urlsplit(address).scheme not in ("https", request.type):
            nothing = io.BytesIO(b"a redirect to another protocol")
            raise urllib.error.HTTPError(address, code, "redirected to another protocol", headers, nothing)
        return super().redirect_request(request, answer, code, message, headers, address)


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    """http and https and nothing else: urllib's own opener also reads file:, ftp: and data: addresses."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.ProxyHandler(),
        _Http(deadline),
        _Https(deadline),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener
