"""Processes that make items, such as batches, ahead of their use.

Each worker sends its items through a socket of its own and shares nothing with the other workers: no lock, no queue, no
files of /dev/shm (64 MB in a container by default). So the training process notices at once that a worker was killed,
whatever it was doing, and does not wait forever for one that hangs.
"""

import logging
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import struct
import threading
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.distributed.watchdog import STALLED
from shard_data import progress

READ_AHEAD = 4
"""Items that a worker makes before the first of them is taken."""

HEARTBEAT = 0.25
"""Seconds after which a worker that has no item to send reports that it makes progress, if it does."""

TICKS = 20
"""A timeout is this number of shorter waits in a row without a result. A suspended job loses only one of them."""

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
log = logging.getLogger("pipeline")


class WorkerFailed(OSError):
    """A worker was killed, or nothing was read for too long."""


class Source(Protocol):
    """Makes items. Workers that are not forked get a pickled copy.

    A slow item is no hang as long as `shard_data.progress` counts what is read for it.
    """

    def __getitem__(self, number: int) -> Any:
        """Item `number`."""


def iterate(source: Source, numbers: range, timeout: float | None = None) -> Iterator[Any]:
    """The items of these numbers, made in this process, which ends (exit code 83) when there is no progress for
    `timeout` seconds.
    """
    with _StallGuard(timeout) as guard:
        for number in numbers:
            with guard.watching():
                item = source[number]
            yield item


def iterate_in_workers(source: Source, numbers: range, workers: int, timeout: float | None = None) -> Iterator[Any]:
    """The items of these numbers in order, made ahead by this many processes: worker w makes each `workers`-th, from
    the w-th on.

    An error in a worker is raised here in the turn of its item. Raises WorkerFailed when a worker is killed, and when
    the next item does not come and its worker makes no progress for `timeout` seconds.
    """
    workers = min(workers, len(numbers))
    pool: list[_Worker] = []
    try:
        with _signals_blocked():
            pool.extend(_Worker(source, numbers[number::workers], number, timeout) for number in range(workers))
        for place in range(len(numbers)):
            yield pool[place % workers].take()
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """One process, seen from the training process."""

    def __init__(self, source: Source, numbers: range, number: int, timeout: float | None):
        self._name = f"data loader worker {number}"
        self._timeout = timeout
        self._socket, other = socket.socketpair()
        self._socket.settimeout(None if timeout is None else timeout / TICKS)
        self._process = multiprocessing.Process(
            target=_work, args=(source, numbers, other), name=self._name, daemon=True
        )
        with closing(other):
            self._process.start()

    def take(self) -> Any:
        """Its next item."""
        try:
            item = _receive(self._socket)
        except _NothingReceived:
            raise WorkerFailed(_stalled(f"{self._name} (process {self._process.pid})", self._timeout)) from None
        except (EOFError, ConnectionError):
            raise WorkerFailed(self._describe_end()) from None
        if isinstance(item, _Failure):
            raise item.error
        return item

    def _describe_end(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
        fix = "; if memory ran out, lower data.workers or the batch size" if how == "SIGKILL" else ""
        return f"{self._name} (process {self._process.pid}) ended unexpectedly: {how}{fix}"

    def end(self) -> None:
        """Kills the process. It only reads, so there is nothing to lose."""
        self._socket.close()
        self._process.kill()
        self._process.join(5)


def _stalled(who: str, timeout: float | None) -> str:
    return (
        f"the data loader is stuck: {who} has read nothing for {timeout:g} s (train.collective_timeout); "
        "look at the disk or network that holds data.root"
    )


# ----------------------------------------------------------------------------------------------------- in the worker


class _Failure:
    """An error in the place of an item."""

    def __init__(self, error: Exception):
        self.error = error


def _work(source: Source, numbers: range, connection: socket.socket) -> None:
    """The main function of a worker. A second thread makes the items; this one sends them."""
    _ignore_signals()
    ready: queue.Queue = queue.Queue(READ_AHEAD)
    threading.Thread(target=_make_all, args=(source, numbers, ready), daemon=True).start()
    with suppress(ConnectionError):  # where nobody reads any more
        _send_all(connection, ready, len(numbers))


def _make_all(source: Source, numbers: range, ready: queue.Queue) -> None:
    torch.set_num_threads(1)
    for number in numbers:
        ready.put(_make(source, number))


def _make(source: Source, number: int) -> Any:
    """The item or its error: with the worker's traceback, unless it is an error that users see as one line."""
    try:
        return source[number]
    except (ValueError, OSError) as error:
        return _Failure(error)
    except Exception:
        return _Failure(RuntimeError(f"in a data loader worker:\n{traceback.format_exc()}"))


def _send_all(connection: socket.socket, ready: queue.Queue, count: int) -> None:
    reported = progress.count()
    while count:
        try:
            _send(connection, ready.get(timeout=HEARTBEAT))
            count -= 1
        except queue.Empty:
            if progress.count() != reported:
                connection.sendall(_HEARTBEAT_MESSAGE)
        reported = progress.count()


def _ignore_signals() -> None:
    """Ctrl-C reaches the whole process group, and SLURM's signals every process of a job: the training process decides
    what they mean. Its workers end when it ends them, or when it has died.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_follow, args=[multiprocessing.parent_process().pid], daemon=True).start()


def _follow(parent: int) -> None:
    """SIGTERM counts only from a worker's own process, which at its exit sends it and waits, as long as that takes."""
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if sent is not None and sent.si_pid == parent:
            break
    os._exit(0)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Workers start with these signals blocked, so that none of their threads receives one before `_ignore_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------------------------------------------- the messages

_LENGTH = struct.Struct("<Q")
_HEARTBEAT_MESSAGE = _LENGTH.pack(0)


def _send(connection: socket.socket, item: Any) -> None:
    """A pickle and the memory of the arrays in it, after the number of these parts and their lengths."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(item, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
    connection.sendall(b"".join(map(_LENGTH.pack, [len(parts), *map(len, parts)])))
    for part in parts:
        connection.sendall(part)


def _receive(connection: socket.socket) -> Any:
    """The next item, without a copy of its arrays. Raises _NothingReceived, EOFError or ConnectionError."""
    count = 0
    while not count:  # of a heartbeat it is 0
        count = _receive_number(connection)
    lengths = [_receive_number(connection) for _ in range(count)]
    body, *buffers = [_receive_bytes(connection, length) for length in lengths]
    return pickle.loads(body, buffers=buffers)  # noqa: S301 - from our own process


def _receive_number(connection: socket.socket) -> int:
    return _LENGTH.unpack(_receive_bytes(connection, _LENGTH.size))[0]


def _receive_bytes(connection: socket.socket, size: int) -> np.ndarray:
    data = np.empty(size, np.uint8)
    rest = memoryview(data)
    quiet = 0
    while len(rest):
        try:
            received = connection.recv_into(rest)
        except TimeoutError:
            quiet += 1
            if quiet == TICKS:
                raise _NothingReceived from None
            continue
        if not received:
            raise EOFError
        rest, quiet = rest[received:], 0
    return data


class _NothingReceived(Exception):
    """For TICKS waits in a row."""


# -------------------------------------------------------------------------------------------------- without a worker


class _StallGuard:
    """A thread that ends the process when the main thread is stuck in a read, which no exception can interrupt."""

    def __init__(self, timeout: float | None):
        self._timeout = timeout
        self._reading = False
        self._num_items = 0
        self._closing = threading.Event()

    def __enter__(self):
        if self._timeout is not None:
            threading.Thread(target=self._watch, args=[self._timeout], name="loader guard", daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._num_items += 1
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def _watch(self, timeout: float) -> None:
        quiet, before = 0, (0, 0)
        while not self._closing.wait(timeout / TICKS):
            now = self._num_items, progress.count()
            quiet = quiet + 1 if self._reading and now == before else 0
            before = now
            if quiet == TICKS:
                log.error("error: %s", _stalled("this process", timeout))
                os._exit(STALLED)
