"""`metrics.jsonl`: what a run measured, one JSON object per step that has something to tell.

A record has `step`, `time` (seconds since 1970), then the figures by their names. Numbers that JSON does not know are
the strings "NaN", "Infinity" and "-Infinity", which Python's `float` reads. Steps ascend without repetition, also over
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
    """Appends records, each by one write. What could not be written (full disk) is written with the next record.

    Records after `last_step`, which the run is about to repeat, are removed first. Raises OSError where that fails.
    """

    def __init__(self, path: Path, last_step: int):
        cut_records(path, last_step)
        self._file = open(path, "r+b" if path.exists() else "x+b", buffering=0)  # noqa: SIM115 - open for the run's length
        self._offset = self._file.seek(0, os.SEEK_END)
        self._tail = (
            b""  # what belongs at the offset: the last record, and before it those that could not be written yet
        )
        self._step: int | None = None
        self._keys: set[str] = set()
        self._failing = False

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures to the record of `step`, beginning it if it is new. A key keeps its first value."""
        assert self._step is None or step >= self._step, f"records go forward: step {step} after {self._step}"
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
            logger.warning("%s: %s; its records are kept in memory until it can be written", self._file.name, fault)
        self._failing = fault is not None

    def sync(self) -> None:
        """Bring what was written to the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s: not brought to the disk: %s", self._file.name, error.strerror)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> list[dict[str, float]]:
    """The whole records of a file, in order; none where there is no file. A torn line is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = [parse(line) for line in lines if line.endswith(b"\n")]
    return [{key: float(v) if isinstance(v, str) else v for key, v in record.items()} for record in records if record]


def cut_records(path: Path, last_step: int) -> None:
    """Remove records after `last_step`, and lines that a kill or a full disk tore; the file is replaced at once."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and (record := parse(line)) and record["step"] <= last_step]
    if kept == lines:
        return
    with replacing(path) as file:
        file.writelines(kept)
    logger.info(
        "%s: %d records after step %d removed, since they are about to be repeated",
        path,
        len(lines) - len(kept),
        last_step,
    )


def parse(line: bytes) -> dict[str, int | float | str] | None:
    """A record as its line has it; None for what is no record."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def json_number(value: float) -> int | float | str:
    """A number as JSON can hold it; "NaN", "Infinity" or "-Infinity" where it has none."""
    if isinstance(value, int):
        return value
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
