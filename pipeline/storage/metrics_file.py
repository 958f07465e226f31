"""`metrics.jsonl`: the scalars of a run, one JSON object per logged step.

A record has `step`, `time` (seconds since 1970), then the scalars by name. Numbers that JSON cannot represent are the
strings "NaN", "Infinity" and "-Infinity", which Python's `float` reads. Steps ascend without repetition, also over
restarts.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.storage.atomic import atomic_file
from shard_data.files import open_regular

logger = logging.getLogger(__name__)

MAX_RECORD = 2**20
"""Bytes of a record that is read."""
_START = re.compile(rb'\{"step": (\d{1,18})[,}]')


class MetricsFile:
    """Appends records, each with one write. A record that cannot be written (full disk) is written with the next one.

    Records after `last_step`, whose steps are about to be repeated, are removed first. Raises OSError if that fails.
    """

    def __init__(self, path: Path, last_step: int):
        cut_records(path, last_step)
        self._file = open(path, "r+b" if path.exists() else "x+b", buffering=0)  # noqa: SIM115 - open for the run's length
        self._offset = self._file.seek(0, os.SEEK_END)
        self._tail = b""  # the bytes from the offset on: records that are not written yet, then the last record
        self._step: int | None = None
        self._keys: set[str] = set()
        self._failing = False

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars to the record of `step`, which is created if it is new. A key keeps its first value."""
        assert self._step is None or step >= self._step, f"steps must not decrease: step {step} after {self._step}"
        if not values:
            return
        if step != self._step:
            self._begin(step)
        fields = {key: json_number(value) for key, value in values.items() if key not in self._keys}
        if fields:
            self._keys.update(fields)
            self._tail = self._tail[: -len(b"}\n")] + b", " + json.dumps(fields).encode()[1:] + b"\n"
        self._write()

    def _begin(self, step: int) -> None:
        if not self._failing:
            self._offset += len(self._tail)
            self._tail = b""
        self._tail += json.dumps({"step": step, "time": round(time.time(), 3)}).encode() + b"\n"
        self._step, self._keys = step, {"step", "time"}

    def _write(self) -> None:
        try:
            written = os.pwrite(self._file.fileno(), self._tail, self._offset)
            fault = None if written == len(self._tail) else "no space left"
        except OSError as error:
            fault = error.strerror
        if fault and not self._failing:
            logger.warning("%s: %s; records are kept in memory until they can be written", self._file.name, fault)
        self._failing = fault is not None

    def sync(self) -> None:
        """Flush the file to disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s: could not be flushed to disk: %s", self._file.name, error.strerror)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> Iterator[dict[str, int | float]]:
    """The complete records of a file, in order; none if there is no file. Every record has `step` and a finite `time`
    (0.0 where the file has none).

    Lines that are no records, and values that are no numbers, are skipped. Raises OSError for a symbolic link.
    """
    yield from (record for line in read_lines(path) if (record := read_record(line)) is not None)


def read_record(line: bytes) -> dict[str, int | float] | None:
    """The numbers of one line; None for a line that is no record."""
    if len(line) > MAX_RECORD or not (record := parse(line)):
        return None
    numbers = {key: number for key, value in record.items() if (number := _number(value)) is not None}
    written = numbers.get("time", 0.0)
    numbers["time"] = written if math.isfinite(written) else 0.0
    return numbers


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that end with a newline; none if there is no file."""
    try:
        with open_regular(path) as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except FileNotFoundError:
        return


def cut_records(path: Path, last_step: int) -> None:
    """Remove records after `last_step` and incomplete lines (from a kill or a full disk), atomically."""
    kept = sum(len(line) for line in read_lines(path) if _is_kept(line, last_step))
    if not path.exists() or kept == path.stat().st_size:
        return
    with atomic_file(path) as file:
        file.writelines(line for line in read_lines(path) if _is_kept(line, last_step))
    logger.info("%s: removed what followed step %d; those steps are repeated", path, last_step)


def _is_kept(line: bytes, last_step: int) -> bool:
    """Of a line longer than a record only the start is read."""
    if len(line) > MAX_RECORD:
        found = _START.match(line)
        return found is not None and int(found[1]) <= last_step
    record = parse(line)
    return record is not None and record["step"] <= last_step


def parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None for anything else, and for an object without a valid `step`."""
    try:
        record = json.loads(line)
        return record if type(record["step"]) is int and 0 <= record["step"] < 2**63 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _number(value: Any) -> int | float | None:
    """A value of a record as a number; None if it is none."""
    if isinstance(value, str):
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else None
    if type(value) is int:
        return value if abs(value) < 2**63 else None
    return value if type(value) is float else None


def json_number(value: float) -> int | float | str:
    """A number that JSON can represent, or one of the strings "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, int):
        return value
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
