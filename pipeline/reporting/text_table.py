"""Rows of runs as lines of text, as many columns as the terminal has room for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.reporting.run_table import Row
from pipeline.reporting.text import number
from shard_data.terminal import duration, padded

GAP = "  "
"""Between columns."""
MAX_NAME = 48
MAX_NOTES = 8
DASH = "\N{EN DASH}"
STYLES = {"good": "green", "busy": "cyan", "warn": "yellow", "bad": "red", "quiet": "dim"}
"""Of the tones of a state."""


@dataclass(frozen=True)
class Column:
    """One column. Those of the largest `rank` are omitted first on a narrow terminal."""

    head: str
    text: Callable[[Row], str]
    rank: int
    numeric: bool = True


COLUMNS = (
    Column("run", lambda row: _shortened(row.name), 0, numeric=False),
    Column("model", lambda row: row.model or DASH, 7, numeric=False),
    Column("data", lambda row: row.data.rstrip("/").rpartition("/")[2] or DASH, 8, numeric=False),
    Column("state", lambda row: row.state, 0, numeric=False),
    Column("step", lambda row: _steps(row), 0),
    Column("left", lambda row: DASH if row.seconds_left is None else duration(row.seconds_left), 1),
    Column("of", lambda row: row.objective or DASH, 2, numeric=False),
    Column("newest", lambda row: number(row.newest, 5), 4),
    Column("best", lambda row: number(row.best, 5), 2),
    Column("images/s", lambda row: number(row.images_per_second, 3), 5),
    Column("age", lambda row: duration(row.age_seconds) if row.time else DASH, 3),
    Column("attempts", lambda row: str(row.attempts or DASH), 6),
)


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"


def _steps(row: Row) -> str:
    if not row.total_steps:
        return f"{row.step:,}"
    return f"{row.step:,}/{row.total_steps:,} {100 * row.step // row.total_steps:3d} %"


def table_lines(rows: Sequence[Row], width: int | None, paint: Callable[[str, str], str]) -> list[str]:
    """The table, with a line for the columns that have no room. `width`: letters of a line; None: all columns.
    `paint` gives a text in a style of shard_data.terminal.
    """
    columns = COLUMNS
    table = _cells(columns, rows)
    while width is not None and len(GAP.join(table[0])) > width and any(column.rank for column in columns):
        largest = max(column.rank for column in columns)
        columns = [column for column in columns if column.rank < largest]
        table = _cells(columns, rows)
    lines = []
    for row, cells in zip([None, *rows], table, strict=True):
        styles = ["bold" if row is None else STYLES[row.tone] if column.head == "state" else "" for column in columns]
        lines.append(GAP.join(map(paint, cells, styles)).rstrip())
    hidden = [column.head for column in COLUMNS if column not in columns]
    return lines + ([f"{width} letters wide, so without: {', '.join(hidden)}"] if hidden else [])


def _cells(columns: Sequence[Column], rows: Sequence[Row]) -> list[list[str]]:
    """The texts of the columns' heads, then of each row, padded."""
    texts = [[column.head for column in columns], *([column.text(row) for column in columns] for row in rows)]
    return padded(texts, [column.numeric for column in columns])


def note_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each run with something to say: why it ended, what is missing in its folder."""
    stopped = ("preempted", "interrupted")  # by a signal, which says no more than the state
    said = {row.name: [f"{row.reason}."] if row.reason and row.state not in stopped else [] for row in rows}
    notes = [f"{row.name}: {' '.join([*said[row.name], *row.notes])}" for row in rows if said[row.name] or row.notes]
    more = len(notes) - MAX_NOTES
    return notes[:MAX_NOTES] + ([f"{more} more such lines; --json has all"] if more > 0 else [])
