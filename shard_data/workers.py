"""Writes shards with several processes and one progress bar.

A task is a whole shard, so its bytes do not depend on the process that writes it. Processes are spawned, not forked:
they inherit no threads or locks of the calling program.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shard_data.errors import BadImage, DataError
from shard_data.progress import advance
from shard_data.shard import Layout, write_shard
from shard_data.source import Record, Sample, Source
from shard_data.terminal import Progress

TICK = 32  # images between two updates of the shared counter


class Task(NamedTuple):
    """One shard to write."""

    stem: str
    records: Sequence[Record]


class Stopped(Exception):
    """Another worker failed, or the user interrupted: the current shard is abandoned."""


@dataclass(frozen=True)
class ShardWriter:
    """What a process needs to write any shard of a set."""

    source: Source
    folder: Path
    layout: Layout

    def write(self, task: Task, tick) -> dict[str, Any]:
        """Write the task's shard and return its manifest entry. `tick(number of images)` is called as they are done.

        Unreadable images are skipped; "omitted" in the entry lists their [name, reason].
        """
        bad: list[list[str]] = []
        entry = write_shard(self.folder, task.stem, self._samples(task.records, tick, bad), self.layout)
        return {**entry, "omitted": bad} if bad else entry

    def _samples(self, records: Sequence[Record], tick, bad: list[list[str]]) -> Iterator[tuple[str, Sample]]:
        for start in range(0, len(records), TICK):
            part = records[start : start + TICK]
            for record in part:
                try:
                    sample = self.source.load(record)
                except BadImage as error:
                    bad.append([error.name, error.reason])
                    continue
                yield record.key, sample
            tick(len(part))


def write_all(writer: ShardWriter, tasks: Sequence[Task], workers: int, bar: Progress) -> Iterator[dict[str, Any]]:
    """Write every task's shard and yield the entries as they are finished, in any order."""
    if workers == 1 or len(tasks) < 2:
        return (writer.write(task, lambda count: _show(bar, count)) for task in tasks)
    return _write_in_processes(writer, tasks, min(workers, len(tasks)), bar)


def _write_in_processes(
    writer: ShardWriter, tasks: Sequence[Task], workers: int, bar: Progress
) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (writer, counter, stop)) as pool:
        try:
            waiting, shown = {pool.submit(_work, task) for task in tasks}, 0
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                before, shown = shown, counter.value
                _show(bar, shown - before)
                yield from map(_result, done)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _show(bar: Progress, count: int) -> None:
    """`count` more images are converted."""
    if count:
        advance()
        bar.update(count)


def _result(future: Future) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, most likely because memory ran out; the same command with --workers 1 resumes"
        ) from None


def _start_worker(writer: ShardWriter, counter, stop) -> None:
    """Runs once in each worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and sets `stop`
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    global _worker_state
    _worker_state = (writer, counter, stop)


def _exit_with_parent() -> None:
    """Without this, the workers of a killed parent would wait for tasks indefinitely."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task: Task) -> dict[str, Any]:
    writer, counter, stop = _worker_state

    def tick(count: int) -> None:
        with counter.get_lock():
            counter.value += count
        if stop.is_set():
            raise Stopped

    return writer.write(task, tick)
