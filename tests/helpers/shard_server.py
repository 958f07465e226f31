"""An HTTP server on loopback for tests: files of a folder, and faults by request."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shard_data import fetch as fetching

Fault = Callable[[BaseHTTPRequestHandler, bytes], None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that hangs up is part of the tests."""


class ShardServer:
    """A context manager. `requests` counts paths; `faults[name]` answers the next requests of a file instead."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        shards = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802 - the name that http.server calls
                place, _, name = self.path.rpartition("/")
                with shards._lock:
                    shards.requests[name] += 1
                    waiting = shards.faults.get(name)
                    fault = waiting.pop(0) if waiting else None
                path = folder / name
                content = path.read_bytes() if place == "/sets/made" and path.is_file() else None
                if fault:
                    fault(self, content or b"")
                elif content is None:
                    self.send_error(404)
                else:
                    answer(self, content)

            def log_message(self, *_):
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/sets/made"

    def __enter__(self) -> "ShardServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def answer(handler: BaseHTTPRequestHandler, content: bytes, length: int | None = -1) -> None:
    """200 with this content; `length` is announced, the true one by default, none where None."""
    handler.send_response(200)
    if length is not None:
        handler.send_header("Content-Length", str(len(content) if length == -1 else length))
    handler.end_headers()
    handler.wfile.write(content)


# -------------------------------------------------------------------------------------------------------------- faults


def send(content: bytes, length: int | None = -1) -> Fault:
    """Something else than the file."""
    return lambda handler, _content: answer(handler, content, length)


def refuse(code: int, body: bytes | None = None) -> Fault:
    """An HTTP error; its body is a web page by default."""

    def fault(handler: BaseHTTPRequestHandler, _content: bytes) -> None:
        if body is None:
            handler.send_error(code)
            return
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return fault


def redirect(address: str) -> Fault:
    def fault(handler: BaseHTTPRequestHandler, _content: bytes) -> None:
        handler.send_response(302)
        handler.send_header("Location", address)
        handler.end_headers()

    return fault


def cut(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """The connection breaks off after half of the file."""
    answer(handler, content[: len(content) // 2], length=len(content))
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler, _content: bytes) -> None:
    """No answer at all."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def stall(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """1,000 bytes of the file, and then nothing for half a minute."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:1000])
    time.sleep(30)


def fetch_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between attempts, and no proxy."""
    monkeypatch.setattr(fetching, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
