"""Results of an evaluation that is not finished, so that the same command can resume it after a kill.

One file per process, beside the report: NAME.rank0.unfinished. The first line holds what is measured, each further line
one result, in order. A line is the CRC-32 of its JSON in hexadecimal, a space, the JSON. Lines are written one at a
time, and reach the disk within SYNC_SECONDS. The file is deleted when the report is written.
"""

import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shard_data.file_lock import FileLock, LockHeld
from shard_data.files import open_regular

log = logging.getLogger("pipeline")

SYNC_SECONDS = 5.0
LOCK_SECONDS = 10.0
"""How long the processes of a killed evaluation may take to end."""
MAX_LINE = 2**26
"""Bytes: a batch of 100,000 images."""
FORMAT = "nvae-pipeline-unfinished-evaluation"


class EvaluationJournal:
    """The results of this rank. `records` are those of an earlier process; `add` keeps more."""

    def __init__(
        self, path: Path, question: dict[str, Any], rank: int = 0, clock: Callable[[], float] = time.monotonic
    ):
        """`path`: the report, or a file beside which the journal is to be. `question`: JSON values; all that the
        results depend on.

        Raises ValueError where another process holds the journal, or it is that of another question.
        """
        self.path = path.with_name(f"{path.name}.rank{rank}.unfinished")
        self._clock, self._synced, self._failed = clock, clock(), False
        self._lock = lock(self.path)
        try:
            self.records = list(self._resume({"format": FORMAT, "version": 1, "question": question}))
        except BaseException:
            self._lock.release()
            raise

    def _resume(self, head: dict[str, Any]) -> list[Any]:
        """Opens the file for more, and returns its records. What follows a damaged line is removed."""
        lines = list(read_lines(self.path))
        values, size = [value for _, value in lines], lines[-1][0] if lines else 0
        if values and values[0] != head:
            raise ValueError(f"{self.path}: {foreign(values[0], head)}")
        present = self.path.stat().st_size if self.path.exists() else 0
        self._file = open(self.path, "r+b" if self.path.exists() else "xb", buffering=0)  # noqa: SIM115 - until `close`
        if size < present:
            kept = f"{max(0, len(values) - 1)} results before that are kept; the others are computed again"
            log.warning("%s: incomplete or damaged at its end; %s", self.path, kept)
            self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)
        if not values:
            self._write(head)
        return values[1:]

    def add(self, record: Any) -> None:
        """Keeps one more result. A disk that is full does not end the evaluation; the log says so."""
        if not self._failed:
            self._write(record)

    def _write(self, value: Any) -> None:
        line = encoded(value)
        try:
            if self._file.write(line) < len(line):
                raise OSError("no space left")
            if self._clock() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = self._clock()
        except OSError as error:
            self._failed = True
            reason = error.strerror or error
            log.warning("%s: %s; the evaluation continues, but cannot be resumed from here", self.path, reason)

    def close(self, delete: bool = False) -> None:
        """Ends the writing. `delete`: the report is written, and the journal no longer needed."""
        self._file.close()
        if delete:
            self.path.unlink(missing_ok=True)
        self._lock.release(delete=delete)


def lock(path: Path) -> FileLock:
    """Raises ValueError where another process holds the journal at `path`."""
    try:
        return FileLock(path.with_name(f"{path.name}.lock")).acquire(LOCK_SECONDS)
    except LockHeld as error:
        raise ValueError(f"{path}: {error.holder} runs this evaluation; wait for it, or stop it") from None


def encoded(value: Any) -> bytes:
    """A line of the file."""
    text = json.dumps(value).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of the lines up to the first that is damaged, each with the number of bytes to its end. None where
    there is no file. Raises OSError for a symbolic link.
    """
    try:
        with open_regular(path) as file:
            while line := file.readline(MAX_LINE):
                text = line[9:].removesuffix(b"\n")
                if line != b"%08x %s\n" % (zlib.crc32(text), text):
                    return
                try:
                    yield file.tell(), json.loads(text)
                except (ValueError, RecursionError):
                    return
    except FileNotFoundError:
        return


def foreign(found: Any, wanted: dict[str, Any]) -> str:
    """The message for a journal of another question."""
    earlier = found.get("question") if isinstance(found, dict) else None
    if not isinstance(earlier, dict) or found.get("format") != FORMAT:
        return "not an unfinished evaluation; remove the file"
    names = [name for name, value in wanted["question"].items() if earlier.get(name) != value]
    parts = [f"{name} {str(earlier.get(name))[:20]}, now {str(wanted['question'][name])[:20]}" for name in names]
    return (
        f"an unfinished evaluation under other conditions ({'; '.join(parts) or 'another version'}); "
        "repeat those to resume it, or remove the file to start over"
    )
