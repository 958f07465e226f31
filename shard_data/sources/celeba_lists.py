"""CelebA's lists: attributes, partition and identities; the original .txt (LF or CRLF) and Kaggle's .csv."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shard_data import downloads
from shard_data.arrivals import HEAD, what_is
from shard_data.errors import DataError

NUM_ATTRIBUTES = 40
NAME = re.compile(r"[A-Za-z0-9_-]+\.jpg")
ATTRIBUTE_VALUES = {"1": 1, "-1": 0, "0": 0}
MAX_BYTES = 1 << 28  # ten times the largest list


@dataclass(frozen=True)
class Table:
    """A list: file names to row numbers, in the file's order, and the rows' values (rows, columns)."""

    path: Path
    columns: tuple[str, ...]
    rows: dict[str, int]
    values: np.ndarray


def find_list(folder: Path, stem: str, required: bool = True) -> Path | None:
    """STEM.txt or STEM.csv, in the folder itself or in Anno/ or Eval/, as the original is published."""
    for place in ("", "Anno", "Eval"):
        for suffix in (".txt", ".csv"):
            path = folder / place / (stem + suffix)
            if path.is_file():
                return path
    if required:
        raise DataError(f"{folder / stem}.txt: not found, nor the .csv; {downloads.REMEDY}")
    return None


def read_attributes(path: Path) -> Table:
    """The attributes as int8 (rows, 40): 1 present, 0 absent."""
    lines = _lines(path)
    if path.suffix == ".csv":
        promised, names = None, next(lines, [])[1:]
    else:
        promised, names = _count(path, next(lines, [])), next(lines, [])
    if len(set(names)) != NUM_ATTRIBUTES:
        raise _damaged(path, f"names {len(set(names))} attributes instead of {NUM_ATTRIBUTES}")
    table = _table(path, tuple(names), lines, ATTRIBUTE_VALUES.__getitem__, np.int8)
    if promised is not None and len(table.rows) != promised:
        raise _damaged(path, f"its first line promises {promised:,} rows, and there are {len(table.rows):,}")
    return table


def read_column(path: Path, largest: int) -> Table:
    """One whole number per image, from 0 to `largest`, as int32 (rows, 1)."""
    lines = _lines(path)
    if path.suffix == ".csv":
        next(lines, None)
    table = _table(path, ("value",), lines, int, np.int64)
    if len(table.values) and not 0 <= table.values.min() <= table.values.max() <= largest:
        raise _damaged(path, f"holds values from {table.values.min()} to {table.values.max()}, not 0 to {largest}")
    return table


def _table(path: Path, columns: tuple[str, ...], lines: Iterator[list[str]], parse, dtype: type) -> Table:
    rows, values = {}, []
    for number, (name, *words) in enumerate(lines):
        if len(words) != len(columns) or name in rows or not NAME.fullmatch(name):
            raise _damaged(path, f"row {number + 1} ({name[:40]}) is none: a new file name and {len(columns)} values")
        try:
            values.append([parse(word) for word in words])
        except (KeyError, ValueError):
            raise _damaged(path, f"row {number + 1} ({name[:40]}) holds something that is no value") from None
        rows[name] = number
    return Table(path, columns, rows, np.array(values, dtype).reshape(-1, len(columns)))


def _lines(path: Path) -> Iterator[list[str]]:
    """The words of every line that has any."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head or not head.isascii() or head.lstrip().startswith(b"<") or b"\0" in head:
        raise _damaged(path, f"is {what_is(head)}")
    separator = "," if path.suffix == ".csv" else None
    if path.stat().st_size > MAX_BYTES:
        raise _damaged(path, f"has more than {MAX_BYTES >> 20} MiB, which no list of CelebA has")
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.strip():
                yield [word.strip() for word in line.split(separator)]


def _count(path: Path, words: list[str]) -> int:
    if len(words) != 1 or not words[0].isdecimal():
        raise _damaged(path, f"begins with {' '.join(words)[:40]!r} instead of the number of its rows")
    return int(words[0])


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; {downloads.REMEDY}")
