"""Threads in every process that end it when its launcher has died, when a process hangs, or when another one failed.

Twice a second each process puts a heartbeat into the store of the process group (through a connection of its own): how
many collectives it has entered, and the position of its main thread. The first and the last rank read all heartbeats. A
rank is missing if others wait for it in a collective, or it sends no heartbeat, for longer than the timeout. A process
that finds a missing rank, or that fails, puts a failure report into the store. The first report counts, and every
process acts on it.

A process that waits for another's long work without a collective (see `Runtime.run_on_main`) is not behind. It waits as
long as that work advances: each heartbeat counts the pieces of work that are done (see `shard_data.progress`). If none
is added for longer than `progress_timeout`, all processes end. A process alone ends in the same way.
"""

import atexit
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from json import dumps, loads
from pathlib import Path
from typing import NamedTuple

from pipeline.distributed.collectives import Store, is_lost_connection
from pipeline.distributed.heartbeat import LONGEST_TICK, SILENT, Heartbeat, Heartbeats
from pipeline.distributed.launcher import Launcher
from pipeline.distributed.stacks import main_thread_position, show_stacks
from shard_data import progress

PERIOD = 0.5  # seconds between heartbeats
REPORT_TIMEOUT = 5.0  # seconds that processes wait for each other's messages before they end
CLOSE_TIMEOUT = 20.0  # seconds that the main process waits at the end for the others to leave
HEAD_START = 5.0  # seconds by which the process that failed leaves earlier, so that the launcher names it as the cause

HUNG, PEER_FAILED, ORPHANED, STALLED = 80, 81, 82, 83
"""Exit codes: a collective timed out; another process failed; the launcher died; work that others waited for made no
progress.
"""

PACKAGE = Path(__file__).parents[1]
log = logging.getLogger("pipeline")


class FailureReport(NamedTuple):
    """Why all processes end."""

    code: int
    message: str
    author: int
    """The rank that failed, or that found the missing one."""
    reporter: int
    """The rank that prints it."""
    num_acknowledgements: int
    """The number of processes that are expected to act on it."""


@dataclass
class Work:
    """What this process does that others wait for without a collective."""

    name: str = ""
    waiting: bool = False
    """Whether it waits for others instead."""


@dataclass
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    world_size: int
    store: Store
    """A connection that nothing blocks for long."""
    timeout: float
    """Seconds that a collective may wait for a process."""
    joined: Callable[[], int]
    """Collectives entered by this process."""


class Watchdog:
    """Watches the launcher from the start, and the other processes after `join()`. Call `close()` before the process
    group is destroyed.
    """

    def __init__(self, work: Work | None = None, progress_timeout: float = math.inf):
        """`progress_timeout`: seconds that `work`, or that of another process, may make no progress."""
        self.stacks: Path | None = None  # folder for the stacks of a hanging run
        # A signal that stops training also ends `accelerate launch`, at once or soon: its end is then no failure.
        self.is_stopping: Callable[[], bool] = lambda: False
        self.failed = False  # whether this process has reported its failure
        self._launcher = Launcher()
        self._world: World | None = None
        self._work = work or Work()
        self._progress_timeout = progress_timeout
        self._host = socket.gethostname()
        self._count = 0
        self._alone = Heartbeats([self._heartbeat()], math.inf, progress_timeout)
        self._heartbeats: Heartbeats | None = None  # where this process observes all
        self._answers = 0  # of the store
        self._joined = threading.Event()
        self._closing = threading.Event()
        self._closed = threading.Event()
        self._failing = threading.Event()
        self._ending = threading.Lock()  # never released
        self._guard = threading.Thread(target=self._watch_launcher, name="watchdog of the launcher", daemon=True)
        self._watcher = threading.Thread(target=self._watch_others, name="watchdog of other processes", daemon=True)
        if self._launcher.exists:
            self._start(self._guard)

    def join(self, world: World) -> None:
        """Starts to send heartbeats and to watch the others. All processes call it at the same time."""
        self._world = world
        self._send_heartbeat()
        world.store.wait(self._keys(), timedelta(seconds=world.timeout))
        if world.rank in (0, world.world_size - 1):
            self._heartbeats = Heartbeats(self._read_heartbeats(), world.timeout, self._progress_timeout)
        self._joined.set()
        self._start(self._watcher)
        if not self._guard.is_alive():
            self._start(self._guard)

    def report_failure(self, error: BaseException) -> None:
        """Ends all processes because of this process's error. Waits a few seconds for them.

        Where another process's failure came first, this one ends with that process's message instead of returning.
        """
        if self._world is None or self.failed:
            return
        self.failed = True
        self._failing.set()
        try:
            self._publish_failure(error)
        except RuntimeError:  # the store is gone, perhaps with our own launcher
            if self._orphaned_just_now():
                self._end_orphan()
        self._stop_watching()
        self._stop()

    def close(self) -> None:
        """Leaves without an error. The main process waits some seconds for the others, since it may hold the store."""
        self._stop_watching()
        if self._world is not None and not self.failed:
            with suppress(RuntimeError):
                self._send_heartbeat(running=False)
                if self._world.rank == 0:
                    wait_until(self._are_others_gone, CLOSE_TIMEOUT)
        self._stop()

    def _are_others_gone(self) -> bool:
        return not any(heartbeat.running for heartbeat in self._read_heartbeats())

    # ------------------------------------------------------------------------------------------------ the threads

    def _start(self, thread: threading.Thread) -> None:
        thread.start()
        atexit.register(self._stop)  # a thread must not be inside torch when the interpreter ends

    def _stop_watching(self) -> None:
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join(REPORT_TIMEOUT)

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        self._stop_watching()
        self._closed.set()
        if self._guard.is_alive():
            self._guard.join(REPORT_TIMEOUT)

    def _watch_launcher(self) -> None:
        """Also the work of a process alone, and whether the store answers, whose launcher may be stopped."""
        last, answers, silence = time.monotonic(), self._answers, 0.0
        while not self._closed.wait(PERIOD):
            if self._launcher.is_gone() and not wait_until(self.is_stopping, PERIOD):
                self._end_orphan()
            elapsed = min(time.monotonic() - last, LONGEST_TICK)
            last = time.monotonic()
            if self._world is None:
                self._check_alone(elapsed)
            silence = silence + elapsed if self._joined.is_set() and self._answers == answers else 0.0
            answers = self._answers
            if self._world is not None and silence > self._world.timeout:
                self._end_without_store(f"has not answered for {silence:.0f} s; is its launcher stopped?")

    def _watch_others(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(PERIOD):
            now = time.monotonic()
            try:
                self._check(now - last)
            except RuntimeError as error:
                self._lose_store(error)
            last = now

    def _check_alone(self, elapsed: float) -> None:
        self._alone.update([self._heartbeat()], elapsed)
        if self._alone.stalled():
            end_within(REPORT_TIMEOUT, STALLED)
            log.error("%s", describe_stall(self._alone))
            show_stacks(self.stacks, 0, in_log=False)
            os._exit(STALLED)

    def _check(self, elapsed: float) -> None:
        self._send_heartbeat()
        report = self._read_report()
        if report is None and self._heartbeats is not None:
            report = self._observe(elapsed)
        if report is not None and not self._failing.is_set():
            self._act_on(report)

    def _send_heartbeat(self, running: bool = True) -> None:
        self._world.store.set(f"heartbeat/{self._world.rank}", self._heartbeat(running).encode())

    def _heartbeat(self, running: bool = True) -> Heartbeat:
        self._count += 1
        joined = self._world.joined() if self._world is not None else 0
        work = progress.count(), self._work.name, self._work.waiting
        return Heartbeat(self._count, joined, self._host, main_thread_position(), running, *work)

    def _read_heartbeats(self) -> list[Heartbeat]:
        texts = self._world.store.multi_get(self._keys())
        self._answers += 1
        return [Heartbeat.decode(text) for text in texts]

    def _keys(self) -> list[str]:
        return [f"heartbeat/{rank}" for rank in range(self._world.world_size)]

    def _observe(self, elapsed: float) -> FailureReport | None:
        self._heartbeats.update(self._read_heartbeats(), elapsed)
        if self._heartbeats.missing():
            code, message = HUNG, describe_missing(self._heartbeats)
        elif self._heartbeats.stalled():
            code, message = STALLED, describe_stall(self._heartbeats)
        else:
            return None
        present = self._heartbeats.present()
        return self._publish(FailureReport(code, message, self._world.rank, present[0], len(present)))

    # ------------------------------------------------------------------------------------------ failure reports

    def _publish(self, report: FailureReport) -> FailureReport:
        """The report that counts: this one, or an earlier one."""
        return FailureReport(*loads(self._world.store.compare_set("report", "", dumps(report))))

    def _read_report(self) -> FailureReport | None:
        store = self._world.store
        found = store.check(["report"])
        self._answers += 1
        return FailureReport(*loads(store.get("report"))) if found else None

    def _act_on(self, report: FailureReport) -> None:
        """Ends this process, in the watchdog's thread, unless its main thread is about to fail too."""
        if report.code == PEER_FAILED and self._failing.wait(1.0):
            return
        self._end(report)

    def _end(self, report: FailureReport) -> None:
        self._ending.acquire()  # the main thread may fail meanwhile, since others have left
        end_within(2 * REPORT_TIMEOUT, report.code)
        if self._world.rank == report.reporter:
            log.error("%s", report.message)
        if report.code in (HUNG, STALLED):
            show_stacks(self.stacks, self._world.rank, in_log=report.code == HUNG)
        with suppress(RuntimeError):
            self._world.store.add("acknowledgements", 1)
            self._await_acknowledgements(report)
        if report.code == PEER_FAILED:
            time.sleep(HEAD_START)
        os._exit(report.code)

    def _await_acknowledgements(self, report: FailureReport) -> None:
        """Waits until all have printed their messages: the launcher ends all processes when the first one exits."""
        wait_until(lambda: self._world.store.add("acknowledgements", 0) >= report.num_acknowledgements, REPORT_TIMEOUT)

    def _publish_failure(self, error: BaseException) -> None:
        world, what = self._world, f"{type(error).__name__}: {error}"
        silent = self._look_for_silent() if is_lost_connection(error) else []
        running = [rank for rank, heartbeat in enumerate(self._read_heartbeats()) if heartbeat.running]
        num_others = len(set(running) - {world.rank, *silent})
        notes = [f"; rank {rank} gives no heartbeat" for rank in silent]
        message = f"rank {world.rank} on {self._host} failed: {what}{''.join(notes)}"
        report = self._publish(FailureReport(PEER_FAILED, message, world.rank, 0, num_others))
        if report.author != world.rank:
            if what not in report.message:
                self._end(report)
            world.store.add("acknowledgements", 1)  # every rank reports an error that all ranks raise
        elif 0 in (world.rank, *silent) and not isinstance(error, (ValueError, OSError)):  # the script reports these
            log.error("%s", message)
        self._await_acknowledgements(report)

    def _look_for_silent(self) -> list[int]:
        """Ranks that send no heartbeat for a few seconds. Returns early when there is a failure report."""
        before = self._read_heartbeats()
        wait_until(lambda: self._read_report() is not None, SILENT)
        pairs = enumerate(zip(before, self._read_heartbeats(), strict=True))
        return [
            rank for rank, (old, new) in pairs if new.running and new.count == old.count and rank != self._world.rank
        ]

    # --------------------------------------------------------------------------------------------------- ending

    def _orphaned_just_now(self) -> bool:
        """A dying process loses its connections a moment before its children."""
        return self._launcher.exists and wait_until(self._launcher.is_gone, PERIOD)

    def _end_orphan(self) -> None:
        end_within(2.0, ORPHANED)
        where = f"on {self._host}" if self._world is None else f"of rank {self._world.rank} on {self._host}"
        log.error("the launcher %s has died; this process ends, so that the run can be started again", where)
        if self._world is not None:
            with suppress(RuntimeError):
                self._publish(FailureReport(ORPHANED, f"the launcher {where} has died", self._world.rank, 0, 0))
        os._exit(ORPHANED)

    def _lose_store(self, error: RuntimeError) -> None:
        """Ends this process. The launcher of the first node, or the main process, holds the store."""
        if self._closing.is_set() or self._failing.is_set():
            return
        if self._orphaned_just_now():
            self._end_orphan()
        self._end_without_store(f"is gone: {error}")

    def _end_without_store(self, problem: str) -> None:
        end_within(REPORT_TIMEOUT, PEER_FAILED)
        log.error("rank %d on %s ends: the store of the process group %s", self._world.rank, self._host, problem)
        os._exit(PEER_FAILED)


def describe_missing(heartbeats: Heartbeats) -> str:
    """A line for each missing rank, below one that says why the run ends."""
    head = f"collective timeout: after {heartbeats.timeout:g} s (train.collective_timeout) all processes end, because"
    return "\n  ".join([head, *map(heartbeats.describe, heartbeats.missing())])


def describe_stall(heartbeats: Heartbeats) -> str:
    """One line about the ranks whose work makes no progress."""
    parts = "; ".join(map(heartbeats.describe_stall, heartbeats.stalled()))
    return f"{parts}; the run ends (train.progress_timeout: {heartbeats.progress_timeout:g} s)"


def wait_until(done: Callable[[], bool], seconds: float | None = None) -> bool:
    """Whether `done()` becomes true within that time. The polling interval grows from 2 to 200 ms."""
    start = time.monotonic()
    while not done():
        waited = time.monotonic() - start
        if seconds is not None and waited > seconds:
            return False
        time.sleep(min(max(waited / 10, 0.002), 0.2))
    return True


def end_within(seconds: float, code: int) -> None:
    """Ends the process after that time even if the caller blocks (a full pipe, a lock, a dead host)."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
