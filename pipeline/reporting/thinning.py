"""Long series in bounded memory: what a screen can show of them, without losing extremes.

Steps are divided into ranges of 2^k steps, the same for every series and every way of reading. Twice as wide ranges are
unions of narrower ones, so that thinning while reading gives the same as thinning everything at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Point = tuple[int, float]
"""(step, value)."""


@dataclass
class _Range:
    """The smallest and the largest value of 2^k steps; of equal ones, the first."""

    lowest: Point
    highest: Point

    def include(self, other: "_Range") -> None:
        """Takes over the extremes of the range that follows."""
        if other.lowest[1] < self.lowest[1]:
            self.lowest = other.lowest
        if other.highest[1] > self.highest[1]:
            self.highest = other.highest


class Envelope:
    """One series: the extremes of at most `max_ranges` ranges of steps, and its first and last value.

    Add values in ascending order of steps. Values that are not finite are counted, and not drawn.
    """

    def __init__(self, max_ranges: int):
        assert max_ranges >= 1
        self.max_ranges = max_ranges
        self.shift = 0
        self.first: Point | None = None
        self.last: Point | None = None
        self.not_finite = 0
        self.first_not_finite: int | None = None
        self._ranges: dict[int, _Range] = {}  # step >> shift -> extremes

    def add(self, step: int, value: float) -> None:
        """Add the value of a step."""
        if not math.isfinite(value):
            self.not_finite += 1
            self.first_not_finite = step if self.first_not_finite is None else self.first_not_finite
            return
        point = (step, value)
        self.first, self.last = self.first or point, point
        held = self._ranges.get(step >> self.shift)
        if held is None:
            self._ranges[step >> self.shift] = _Range(point, point)
            self._widen(self.max_ranges)
        elif value < held.lowest[1]:
            held.lowest = point
        elif value > held.highest[1]:
            held.highest = point

    def _widen(self, max_ranges: int) -> None:
        while len(self._ranges) > max_ranges:
            self.shift += 1
            wider: dict[int, _Range] = {}
            for number, held in self._ranges.items():
                if number >> 1 in wider:
                    wider[number >> 1].include(held)
                else:
                    wider[number >> 1] = held
            self._ranges = wider

    def points(self, max_ranges: int | None = None) -> list[Point]:
        """The points to draw, in ascending order of steps: at most two for each range, and the two ends.

        `max_ranges`: fewer ranges than the series holds; they stay as few.
        """
        if max_ranges is not None:
            self._widen(max_ranges)
        ends = [point for point in (self.first, self.last) if point is not None]
        extremes = [point for held in self._ranges.values() for point in (held.lowest, held.highest)]
        return sorted({*ends, *extremes})


@dataclass
class HeatMap:
    """Several series as a table of means: a row for each series, a column for each range of steps."""

    max_columns: int
    shift: int = 0
    sums: dict[str, dict[int, tuple[float, int]]] = field(default_factory=dict)
    """{row: {step >> shift: (sum, count)}}."""
    columns: set[int] = field(default_factory=set)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add the values of a step; those that are not finite are ignored."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if not finite:
            return
        column = step >> self.shift
        for name, value in finite.items():
            row = self.sums.setdefault(name, {})
            total, count = row.get(column, (0.0, 0))
            row[column] = (total + value, count + 1)
        self.columns.add(column)
        while len(self.columns) > self.max_columns:
            self._halve()

    def _halve(self) -> None:
        self.shift += 1
        self.columns = {column >> 1 for column in self.columns}
        for name, row in self.sums.items():
            wider: dict[int, tuple[float, int]] = {}
            for column, (total, count) in row.items():
                held = wider.get(column >> 1, (0.0, 0))
                wider[column >> 1] = (held[0] + total, held[1] + count)
            self.sums[name] = wider

    def table(self) -> tuple[list[str], list[int], list[list[float | None]]]:
        """Row names in the order of arrival, the first step of each column, and the means (rows, columns)."""
        columns = sorted(self.columns)
        means = [[_mean(row.get(column)) for column in columns] for row in self.sums.values()]
        return list(self.sums), [column << self.shift for column in columns], means


def _mean(cell: tuple[float, int] | None) -> float | None:
    return None if cell is None else cell[0] / cell[1]


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
