"""Fetching from servers that never finish: every attempt ends at its deadline, whatever the server does."""

import gzip
import hashlib
import io
import socket
import threading
import time

import pytest

from shard_data import fetch as fetching
from shard_data.fetch import Expected, FetchFailed, WrongContent, fetch


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(fetching, "ATTEMPTS", 1)
    monkeypatch.setattr(fetching, "TIMEOUT", 0.5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def serve():
    """serve(pieces) -> the address of a server that sends the pieces of bytes that an iterator yields."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run(pieces):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(2**16)
                    for piece in pieces():
                        connection.sendall(piece)
                except OSError:
                    pass

    def start(pieces):
        threading.Thread(target=run, args=(pieces,), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/file"

    yield start
    listener.close()


def slowly(start: bytes, piece: bytes, pause: float = 0.05):
    def pieces():
        yield start
        while True:
            time.sleep(pause)
            yield piece

    return pieces


def endlessly(piece: bytes):
    def pieces():
        while True:
            yield piece

    return pieces


OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
    "header byte by byte": slowly(OK + b"X: ", b"x"),
    "status byte by byte": slowly(b"HTTP/1.1 20", b"0"),
    "100 Continue without end": endlessly(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "100 Continue slowly": slowly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "header of 100 Continue slowly": slowly(b"HTTP/1.1 100 Continue\r\nX: ", b"x"),
    "chunk extension": slowly(OK + b"Transfer-Encoding: chunked\r\n\r\n5;", b"x"),
    "trailer": slowly(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"x"),
    "body without length": slowly(OK + b"\r\n", b"x"),
    "body of an error": slowly(b"HTTP/1.1 404 Not Found\r\n\r\n", b"x"),
    "nothing": slowly(b"", b""),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_every_attempt_ends_at_its_deadline(serve, what):
    address, start = serve(ENDLESS[what]), time.monotonic()
    with pytest.raises(FetchFailed, match=r"answer within 0\.5\d* s|the server answers 404"):
        fetch(address, io.BytesIO(), Expected(1000))
    assert time.monotonic() - start < 5


def test_the_bytes_are_hashed_as_they_are_sent(serve):
    body = gzip.compress(b"content" * 100)
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    target = io.BytesIO()
    fetch(serve(lambda: [head + body]), target, Expected(1000, digest=hashlib.sha256(body).hexdigest()))
    assert target.getvalue() == body


def test_another_hash_is_refused_with_what_arrived(serve):
    address = serve(lambda: [OK + b"Content-Length: 6\r\n\r\n<html>"])
    with pytest.raises(WrongContent, match="a web page arrived, with md5 .* instead of 00"):
        fetch(address, io.BytesIO(), Expected(1000, algorithm="md5", digest="00"))


@pytest.mark.parametrize("status", [b"\x1b[2J nonsense", b"HTTP/1.1 404 \x1b[2J"])
def test_control_characters_of_a_server_do_not_reach_the_message(serve, status):
    with pytest.raises(FetchFailed) as caught:
        fetch(serve(lambda: [status + b"\r\n\r\n"]), io.BytesIO(), Expected(1000))
    assert str(caught.value).isprintable()


def test_no_timer_and_no_connection_is_left(serve):
    before = threading.active_count()
    address = serve(lambda: [OK + b"Content-Length: 2\r\n\r\nok"])
    for _ in range(3):
        fetch(address, io.BytesIO(), Expected(10, 2))
    deadline = time.monotonic() + 5
    while threading.active_count() > before + 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
