"""CelebA's lists: attributes, partition and identities; the original .txt (LF or CRLF) and Kaggle's .csv."""

import re
import warnings
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shard_data import downloads
from shard_data.errors import DataError
from shard_data.file_kinds import HEAD, describe_kind

NUM_ATTRIBUTES = 40
NAME = re.compile(r"[A-Za-z0-9_-]+\.jpg")
MAX_BYTES = 1 << 26  # more than twice the largest list
MAX_ROWS = 1_000_000  # five times as many as CelebA has
MAX_LINE = 4096


@dataclass(frozen=True)
class Table:
    """A list: row numbers by file name, in the file's order, and the values of the rows (rows, columns).

    `count` is the number of all rows in the file, the unwanted ones included.
    """

    path: Path
    columns: tuple[str, ...]
    rows: dict[str, int]
    values: np.ndarray
    count: int


def find_list(folder: Path, stem: str, required: bool = True) -> Path | None:
    """STEM.txt or STEM.csv, in the folder itself or in Anno/ or Eval/, as the original is published."""
    for place in ("", "Anno", "Eval"):
        for suffix in (".txt", ".csv"):
            path = folder / place / (stem + suffix)
            if path.is_file():
                return path
    if required:
        raise downloads.not_found(folder, f"{stem}.txt or {stem}.csv")
    return None


def read_attributes(path: Path, wanted: Container[str]) -> Table:
    """The attributes of the wanted images as int8 (rows, 40): 1 present, 0 absent."""
    lines = _lines(path)
    if path.suffix == ".csv":
        declared, names = None, next(lines, "").split(",")[1:]
    else:
        declared, names = _count(path, next(lines, "")), next(lines, "").split()
    if len(set(names)) != NUM_ATTRIBUTES:
        raise _damaged(path, f"names {len(set(names))} attributes instead of {NUM_ATTRIBUTES}")
    table = _table(path, tuple(names), lines, (-1, 1), wanted)
    if declared is not None and table.count != declared:
        raise _damaged(path, f"its first line says {declared:,} rows, but it has {table.count:,}")
    return replace(table, values=(table.values == 1).astype(np.int8))


def read_column(path: Path, largest: int, wanted: Container[str] | None = None) -> Table:
    """One integer per image, from 0 to `largest`, as int64 (rows, 1); of all images, or of the wanted ones."""
    lines = _lines(path)
    if path.suffix == ".csv":
        next(lines, None)
    return _table(path, ("value",), lines, (0, largest), wanted)


def _table(
    path: Path, columns: tuple[str, ...], lines: Iterator[str], limits: tuple[int, int], wanted: Container[str] | None
) -> Table:
    """The wanted rows below the header of a list. Raises DataError unless the values are integers within the limits."""
    rows, values, count, separator = {}, bytearray(), 0, "," if path.suffix == ".csv" else " "
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for _numbers
        for count, line in enumerate(lines, 1):
            name, _, rest = line.partition(separator)
            if count > MAX_ROWS:
                raise _damaged(path, f"has more than {MAX_ROWS:,} rows")
            if wanted is not None and name not in wanted:
                continue  # most rows, if only some of the images exist
            row = _numbers(rest, separator)
            if row is None or len(row) != len(columns) or name in rows or not NAME.fullmatch(name):
                raise _damaged(path, f"row {count} ({name[:40]!r}) is not a new file name and {len(columns)} number(s)")
            rows[name] = len(rows)
            values += row.tobytes()
    table = np.frombuffer(values, np.int64).reshape(-1, len(columns))
    if len(table) and not limits[0] <= table.min() <= table.max() <= limits[1]:
        raise _damaged(path, f"holds values from {table.min()} to {table.max()}, not {limits[0]} to {limits[1]}")
    return Table(path, columns, rows, table, count)


def _numbers(text: str, separator: str) -> np.ndarray | None:
    """The integers in the text; None if it has anything else, about which numpy warns."""
    try:
        return np.fromstring(text, np.int64, sep=separator)
    except (DeprecationWarning, ValueError):
        return None


def _lines(path: Path) -> Iterator[str]:
    """Every line that is not empty, stripped."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head or not head.isascii() or head.lstrip().startswith(b"<") or b"\0" in head:
        raise _damaged(path, f"is {describe_kind(head)}")
    if path.stat().st_size > MAX_BYTES:
        raise _damaged(path, f"is larger than {MAX_BYTES >> 20} MiB, unlike any list of CelebA")
    with open(path, encoding="ascii", errors="replace") as file:
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise _damaged(path, f"has a line of {MAX_LINE} characters or more")
            if line := line.strip():
                yield line


def _count(path: Path, line: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", line):
        raise _damaged(path, f"begins with {line[:40]!r} instead of the number of its rows")
    return int(line)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; {downloads.FETCH_AGAIN}")
