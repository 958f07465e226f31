"""`metrics.jsonl`: the scalars of a run, one JSON object per logged step.

A record has `step`, `time` (seconds since 1970), then the scalars by name. Numbers that JSON cannot represent are the
strings "NaN", "Infinity" and "-Infinity", which Python's `float` reads. Steps ascend without repetition, also over
restarts.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.storage.atomic import replacing

logger = logging.getLogger(__name__)


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


def read_records(path: Path) -> list[dict[str, float]]:
    """The complete records of a file, in order; none if there is no file. An incomplete line is skipped."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = [parse(line) for line in lines if line.endswith(b"\n")]
    return [{key: float(v) if isinstance(v, str) else v for key, v in record.items()} for record in records if record]


def cut_records(path: Path, last_step: int) -> None:
    """Remove records after `last_step` and incomplete lines (from a kill or a full disk), atomically."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and (record := parse(line)) and record["step"] <= last_step]
    if kept == lines:
        return
    with replacing(path) as file:
        file.writelines(kept)
    logger.info(
        "%s: removed %d records after step %d, which are about to be repeated",
        path,
        len(lines) - len(kept),
        last_step,
    )


def parse(line: bytes) -> dict[str, int | float | str] | None:
    """The record in a line; None if the line is not a record."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def json_number(value: float) -> int | float | str:
    """A number that JSON can represent, or one of the strings "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, int):
        return value
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
