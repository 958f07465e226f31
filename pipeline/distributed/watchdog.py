"""A thread in every process that ends it when its launcher has died, when a process hangs, or when another one failed.

Twice a second each process puts a heartbeat into the store of the process group (through a connection of its own): how
many collectives it has entered, and where its main thread is. The first and the last rank read them all. A rank that
others wait for in a collective, or that gives no heartbeat, for longer than the timeout is missing. Whoever finds that,
or fails itself, puts one verdict into the store; the first one stands, and every process acts on it.

A process that waits for another's long work without a collective (see `Runtime.run_on_main`) is not behind: it may
wait as
long as heartbeats come.
"""

import atexit
import faulthandler
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from json import dumps, loads
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pipeline.distributed.collectives import Store, is_lost_connection
from pipeline.distributed.heartbeat import SILENT, Beat, Roll
from pipeline.distributed.launcher import Launcher

PERIOD = 0.5  # seconds between heartbeats
LAST_WORDS = 5.0  # seconds that processes wait for each other's messages before they end
PARTING = 20.0  # seconds that the main process waits at the end for the others to leave
HEAD_START = 5.0  # seconds by which the process that failed leaves earlier, so that the launcher names it as the cause

HUNG, PEER_FAILED, ORPHANED = 80, 81, 82
"""Exit codes: a collective timed out; another process failed; the launcher died."""

PACKAGE = Path(__file__).parents[1]
log = logging.getLogger("pipeline")


class Verdict(NamedTuple):
    """Why all processes end."""

    code: int
    message: str
    author: int
    """The rank that found it, or that failed."""
    speaker: int
    """The rank that prints it."""
    witnesses: int
    """Processes expected to act on it."""


@dataclass
class Crew:
    """The processes of a run, as one of them sees them."""

    rank: int
    world_size: int
    store: Store
    """Used by nothing that waits long in it."""
    timeout: float
    """Seconds that a collective may wait for a process."""
    joined: Callable[[], int]
    """Collectives entered by this process."""


class Watchdog:
    """Watches the launcher from the start, and the crew once it has been joined. `close()` before the process group is
    destroyed.
    """

    def __init__(self):
        self.stacks: Path | None = None  # folder for the stacks of a hanging run
        self.failed = False  # whether this process has told the others that it failed
        self._launcher = Launcher()
        self._crew: Crew | None = None
        self._host = socket.gethostname()
        self._count = 0
        self._roll: Roll | None = None
        self._closing = threading.Event()
        self._failing = threading.Event()
        self._ending = threading.Lock()  # never released
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._launcher.exists:
            self._start()

    def join(self, crew: Crew) -> None:
        """Begins to tell of itself and to watch the others; all processes call it at the same time."""
        self._crew = crew
        self._beat()
        crew.store.wait(self._keys(), timedelta(seconds=crew.timeout))
        if crew.rank in (0, crew.world_size - 1):
            self._roll = Roll(self._beats(), crew.timeout)
        if not self._thread.is_alive():
            self._start()

    def report_failure(self, error: BaseException) -> None:
        """Tells all processes to end because of this process's error, and waits a few seconds for them to do so.

        Where another process's failure came first, this one ends with that process's message instead of returning.
        """
        if self._crew is None or self.failed:
            return
        self.failed = True
        self._failing.set()
        try:
            self._tell_failure(error)
        except RuntimeError:  # the store is gone, perhaps with our own launcher
            if self._orphaned_just_now():
                self._end_orphan()
        self._stop()

    def close(self) -> None:
        """Leaves in good order. The main process leaves last, since the store may go with it, for seconds only."""
        self._stop()
        if self._crew is None or self.failed:
            return
        with suppress(RuntimeError):
            self._beat(here=False)
            if self._crew.rank == 0:
                wait_until(lambda: not any(beat.here for beat in self._beats()), PARTING)

    # ------------------------------------------------------------------------------------------------ the thread

    def _start(self) -> None:
        self._thread.start()
        atexit.register(self._stop)  # a thread in the midst of a call into torch must not meet the interpreter's end

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(LAST_WORDS)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(PERIOD):
            if self._launcher.is_gone():
                self._end_orphan()
            if self._crew is None:
                continue
            now = time.monotonic()
            try:
                self._attend(now - last)
            except RuntimeError as error:
                self._lose_store(error)
            last = now

    def _attend(self, elapsed: float) -> None:
        self._beat()
        verdict = self._verdict()
        if verdict is None and self._roll is not None:
            verdict = self._observe(elapsed)
        if verdict is not None and not self._failing.is_set():
            self._obey(verdict)

    def _beat(self, here: bool = True) -> None:
        crew = self._crew
        self._count += 1
        beat = Beat(self._count, crew.joined(), self._host, whereabouts(), here)
        crew.store.set(f"beat/{crew.rank}", beat.encode())

    def _beats(self) -> list[Beat]:
        return [Beat.decode(text) for text in self._crew.store.multi_get(self._keys())]

    def _keys(self) -> list[str]:
        return [f"beat/{rank}" for rank in range(self._crew.world_size)]

    def _observe(self, elapsed: float) -> Verdict | None:
        self._roll.note(self._beats(), elapsed)
        missing, present = self._roll.missing(), self._roll.present()
        if not missing:
            return None
        lines = [
            f"collective timeout: after {self._crew.timeout:g} s (train.collective_timeout) all processes end, because",
            *(f"  {self._roll.describe(rank)}" for rank in missing),
        ]
        return self._publish(Verdict(HUNG, "\n".join(lines), self._crew.rank, present[0], len(present)))

    # ------------------------------------------------------------------------------------------------- verdicts

    def _publish(self, verdict: Verdict) -> Verdict:
        """The verdict that stands: this one, or one that came before."""
        return Verdict(*loads(self._crew.store.compare_set("verdict", "", dumps(verdict))))

    def _verdict(self) -> Verdict | None:
        store = self._crew.store
        return Verdict(*loads(store.get("verdict"))) if store.check(["verdict"]) else None

    def _obey(self, verdict: Verdict) -> None:
        """Ends this process, in the watchdog's thread, unless its main thread is about to fail by itself."""
        if verdict.code == PEER_FAILED and self._failing.wait(1.0):
            return
        self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        self._ending.acquire()  # the main thread may fail meanwhile, since others have left
        end_within(2 * LAST_WORDS, verdict.code)
        if self._crew.rank == verdict.speaker:
            log.error("%s", verdict.message)
        if verdict.code == HUNG:
            self._show_stacks()
        with suppress(RuntimeError):
            self._crew.store.add("witnesses", 1)
            self._await_witnesses(verdict)
        if verdict.code == PEER_FAILED:
            time.sleep(HEAD_START)
        os._exit(verdict.code)

    def _await_witnesses(self, verdict: Verdict) -> None:
        """The launcher ends all processes when the first has left: each waits until all have said what they have to."""
        wait_until(lambda: self._crew.store.add("witnesses", 0) >= verdict.witnesses, LAST_WORDS)

    def _tell_failure(self, error: BaseException) -> None:
        crew, what = self._crew, f"{type(error).__name__}: {error}"
        silent = self._look_for_silent() if is_lost_connection(error) else []
        others = [rank for rank, beat in enumerate(self._beats()) if beat.here and rank not in (crew.rank, *silent)]
        notes = [f"; rank {rank} gives no heartbeat" for rank in silent]
        message = f"rank {crew.rank} on {self._host} failed: {what}{''.join(notes)}"
        verdict = self._publish(Verdict(PEER_FAILED, message, crew.rank, speaker=0, witnesses=len(others)))
        if verdict.author != crew.rank:
            if what not in verdict.message:
                self._end(verdict)
            crew.store.add("witnesses", 1)  # an error that all meet alike is each one's own to tell
        elif 0 in (crew.rank, *silent) and not isinstance(error, (ValueError, OSError)):  # these the script tells
            log.error("%s", message)
        self._await_witnesses(verdict)

    def _look_for_silent(self) -> list[int]:
        """Ranks from which no heartbeat comes while we listen, or until a verdict tells more."""
        before = self._beats()
        wait_until(lambda: self._verdict() is not None, SILENT)
        pairs = enumerate(zip(before, self._beats(), strict=True))
        return [rank for rank, (old, new) in pairs if new.here and new.count == old.count and rank != self._crew.rank]

    # --------------------------------------------------------------------------------------------------- ending

    def _orphaned_just_now(self) -> bool:
        """A dying process loses its connections a moment before its children."""
        return self._launcher.exists and wait_until(self._launcher.is_gone, PERIOD)

    def _end_orphan(self) -> None:
        end_within(2.0, ORPHANED)
        where = f"on {self._host}" if self._crew is None else f"of rank {self._crew.rank} on {self._host}"
        log.error("the launcher %s has died; this process ends, so that the run can be started again", where)
        if self._crew is not None:
            with suppress(RuntimeError):
                self._publish(Verdict(ORPHANED, f"the launcher {where} has died", self._crew.rank, 0, 0))
        os._exit(ORPHANED)

    def _lose_store(self, error: RuntimeError) -> None:
        """The store lives with the launcher of the first node, or with the main process."""
        if self._closing.is_set() or self._failing.is_set():
            return
        if self._orphaned_just_now():
            self._end_orphan()
        end_within(LAST_WORDS, PEER_FAILED)
        log.error("rank %d on %s ends: the store of the process group is gone: %s", self._crew.rank, self._host, error)
        os._exit(PEER_FAILED)

    def _show_stacks(self) -> None:
        """Every thread's Python stack, to the log and to a file of this rank."""
        name = f"rank_{self._crew.rank:05d}.txt"
        try:
            text = write_stacks(self.stacks and self.stacks / name)
        except OSError as error:
            log.error("%s: %s", name, error)
            faulthandler.dump_traceback(all_threads=True)
            return
        log.error("rank %d on %s, Python stacks:\n%s", self._crew.rank, self._host, text)


def whereabouts() -> str:
    """The innermost place of the main thread that is in this package, or else the innermost of all."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            return place(frame)
        frame = frame.f_back
    return place(innermost) if innermost is not None else "its end"


def place(frame: FrameType) -> str:
    """As `pipeline/training/trainer.py:12 in fit`."""
    file = Path(frame.f_code.co_filename)
    shown = file.relative_to(PACKAGE.parent) if file.is_relative_to(PACKAGE) else file
    return f"{shown}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def write_stacks(path: Path | None) -> str:
    """The Python stacks of all threads, also appended to the file, where one is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") if path is not None else tempfile.TemporaryFile("w+") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        start = file.tell()
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(start)
        return file.read()


def wait_until(done: Callable[[], bool], seconds: float | None = None) -> bool:
    """Whether `done()` came true within that time; asked often at first, then more seldom."""
    start = time.monotonic()
    while not done():
        waited = time.monotonic() - start
        if seconds is not None and waited > seconds:
            return False
        time.sleep(min(max(waited / 10, 0.002), 0.2))
    return True


def end_within(seconds: float, code: int) -> None:
    """The process ends after that time even where the caller is held up (a full pipe, a lock, a dead host)."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
