"""What `metrics.jsonl` says of a run, read once from start to end, in memory that does not grow with its length."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.reporting.thinning import Envelope, HeatMap, Point
from pipeline.storage.metrics_file import MAX_RECORD, read_record
from pipeline.tracking.history import WALL_CLOCK
from shard_data.files import open_regular

MAX_RANGES = 1024
"""Of a curve: two points each, about as many as a wide screen has columns of pixels."""
MAX_COLUMNS = 240
"""Of a heat map."""
MAX_NAMES = 2000
MAX_NAME = 200
"""Series that are read, and letters of a name. A run has some 20 series, and two for each latent group."""
RECENT = 50
"""Records from which the speed is estimated."""
GROUPS = {"kl": "kl/", "active_units": "active_units/"}
"""Heat maps by name: the start of the names of their series."""
NOT_DRAWN = {"step", "time", "attempt", WALL_CLOCK, "samples_seen"}


@dataclass
class Attempt:
    """The records of one start of a run."""

    number: int
    first_step: int
    last_step: int
    begin: float
    """Time of its first record, in seconds since 1970."""
    end: float


@dataclass
class History:
    """Everything that a report shows of `metrics.jsonl`."""

    only: frozenset[str] | None = None
    """The curves that are read; None: all, and the heat maps."""
    curves: dict[str, Envelope] = field(default_factory=dict)
    groups: dict[str, HeatMap] = field(default_factory=lambda: {name: HeatMap(MAX_COLUMNS) for name in GROUPS})
    attempts: list[Attempt] = field(default_factory=list)
    recent: deque[tuple[int, float, int]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """(step, time, attempt) of the last records."""
    best: dict[str, tuple[Point, Point]] = field(default_factory=dict)
    """Of each curve: the smallest and the largest value, each the first of its kind."""
    num_records: int = 0
    not_records: int = 0
    """Lines that are no record."""
    out_of_order: int = 0
    """Records whose step does not follow the one before."""
    names_refused: bool = False
    clock: Envelope = field(default_factory=lambda: Envelope(MAX_RANGES))
    """Seconds of training over all attempts, by step."""
    last_step: int = -1

    def add(self, record: dict[str, int | float]) -> None:
        """Take one record into account."""
        step = int(record["step"])
        if step <= self.last_step:
            self.out_of_order += 1
            return
        self.last_step = step
        self.num_records += 1
        self._add_attempt(step, record)
        if WALL_CLOCK in record and record[WALL_CLOCK] > self.seconds:
            self.clock.add(step, record[WALL_CLOCK])
        if self.only is not None:
            for key in self.only & record.keys():
                self._add_value(key, step, record[key])
            return
        tables: dict[str, dict[str, float]] = {name: {} for name in GROUPS}
        for key, value in record.items():
            for name, start in GROUPS.items():
                if key.startswith(start):
                    tables[name][key[len(start) :]] = value
                    break
            else:
                if key not in NOT_DRAWN:
                    self._add_value(key, step, value)
        for name, values in tables.items():
            self._add_row(name, step, values)

    def _add_attempt(self, step: int, record: dict[str, int | float]) -> None:
        number, time = int(record.get("attempt", 0)) if math.isfinite(record.get("attempt", 0)) else 0, record["time"]
        self.recent.append((step, time, number))
        if not self.attempts or self.attempts[-1].number != number:
            if len(self.attempts) < MAX_NAMES:
                self.attempts.append(Attempt(number, step, step, time, time))
            return
        self.attempts[-1].last_step, self.attempts[-1].end = step, time

    def _add_value(self, key: str, step: int, value: float) -> None:
        curve = self.curves.get(key)
        if curve is None:
            if len(self.curves) >= MAX_NAMES or len(key) > MAX_NAME:
                self.names_refused = True
                return
            curve = self.curves[key] = Envelope(MAX_RANGES)
        curve.add(step, value)
        if math.isfinite(value):
            point = (step, value)
            smallest, largest = self.best.get(key, (point, point))
            if value < smallest[1] or value > largest[1] or key not in self.best:
                self.best[key] = (point if value < smallest[1] else smallest, point if value > largest[1] else largest)

    def _add_row(self, name: str, step: int, values: dict[str, float]) -> None:
        table = self.groups[name]
        known = {row: value for row, value in values.items() if row in table.sums or len(row) <= MAX_NAME}
        room = MAX_NAMES - len(table.sums)
        if len(known.keys() - table.sums.keys()) > room or len(known) < len(values):
            self.names_refused = True
            known = {row: value for row, value in known.items() if row in table.sums}
        if known:
            table.add(step, known)

    def last(self, key: str) -> float | None:
        """The last finite value of a curve."""
        curve = self.curves.get(key)
        return curve.last[1] if curve and curve.last else None

    @property
    def seconds(self) -> float:
        """Of training, over all attempts."""
        return self.clock.last[1] if self.clock.last else 0.0

    def seconds_per_step(self) -> float | None:
        """At the speed of the last records of one attempt, the last that has two; with validation and pictures."""
        for attempt in dict.fromkeys(number for _, _, number in reversed(self.recent)):
            own = [(step, time) for step, time, number in self.recent if number == attempt and time > 0]
            if len(own) > 1 and own[-1][1] > own[0][1]:
                return (own[-1][1] - own[0][1]) / (own[-1][0] - own[0][0])
        return None


class HistoryReader:
    """Reads `metrics.jsonl`, and later what was added to it. `only`: the curves that are read (default: all)."""

    def __init__(self, path: Path, only: frozenset[str] | None = None):
        self.path = path
        self.only = only
        self._start_again()

    def _start_again(self) -> None:
        self.history = History(self.only)
        self._offset = 0
        self._last_line = b""  # before the offset
        self._in_long_line = False

    def read(self, progress: Callable[[int], object] = lambda num_bytes: None) -> History:
        """The history up to the last complete line. Calls `progress` with the bytes that were read, again and again.

        Raises OSError where there is no such file, or it is none.
        """
        with open_regular(self.path) as file:
            file.seek(self._offset - len(self._last_line))
            if file.read(len(self._last_line)) != self._last_line:  # a restart cut the file, or that record grew
                self._start_again()
                file.seek(0)
            while line := file.readline(MAX_RECORD + 1):
                progress(len(line))
                if not line.endswith(b"\n") and len(line) <= MAX_RECORD:
                    break  # the last line, which is being written
                self._offset += len(line)
                self._last_line = line
                self._add(line)
        return self.history

    def _add(self, line: bytes) -> None:
        """A line; or a piece of one that is too long for a record."""
        is_rest, self._in_long_line = self._in_long_line, not line.endswith(b"\n")
        if is_rest:
            return
        record = None if self._in_long_line else read_record(line)
        if record is not None:
            self.history.add(record)
        elif line.strip():
            self.history.not_records += 1
