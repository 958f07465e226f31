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
MAX_BYTES = 1 << 28  # ten times the largest list


@dataclass(frozen=True)
class Table:
    """A list: file names to row numbers, in the file's order, and the rows' values (rows, columns).

    `count` is of all rows in the file, also of those that were not wanted.
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
        raise DataError(f"{folder / stem}.txt: not found, nor the .csv; {downloads.REMEDY}")
    return None


def read_attributes(path: Path, wanted: Container[str]) -> Table:
    """The attributes of the wanted images as int8 (rows, 40): 1 present, 0 absent."""
    lines = _lines(path)
    if path.suffix == ".csv":
        promised, names = None, next(lines, "").split(",")[1:]
    else:
        promised, names = _count(path, next(lines, "")), next(lines, "").split()
    if len(set(names)) != NUM_ATTRIBUTES:
        raise _damaged(path, f"names {len(set(names))} attributes instead of {NUM_ATTRIBUTES}")
    table = _table(path, tuple(names), lines, (-1, 1), wanted)
    if promised is not None and table.count != promised:
        raise _damaged(path, f"its first line promises {promised:,} rows, and there are {table.count:,}")
    return replace(table, values=(table.values == 1).astype(np.int8))


def read_column(path: Path, largest: int, wanted: Container[str] | None = None) -> Table:
    """One whole number per image, from 0 to `largest`, as int64 (rows, 1); of all images, or those that are wanted."""
    lines = _lines(path)
    if path.suffix == ".csv":
        next(lines, None)
    return _table(path, ("value",), lines, (0, largest), wanted)


def _table(
    path: Path, columns: tuple[str, ...], lines: Iterator[str], limits: tuple[int, int], wanted: Container[str] | None
) -> Table:
    """The wanted rows below the head of a list, whose values are whole numbers within the limits."""
    rows, values, number, separator = {}, [], -1, "," if path.suffix == ".csv" else " "
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for _numbers
        for number, line in enumerate(lines):
            name, _, rest = line.partition(separator)
            if wanted is not None and name not in wanted:
                continue  # most rows, where there are only some of the images
            row = _numbers(rest, separator)
            if row is None or len(row) != len(columns) or name in rows or not NAME.fullmatch(name):
                raise _damaged(
                    path, f"row {number + 1} ({name[:40]}) is not a new file name and {len(columns)} numbers"
                )
            rows[name] = len(rows)
            values.append(row)
    table = np.array(values, np.int64).reshape(-1, len(columns))
    if len(table) and not limits[0] <= table.min() <= table.max() <= limits[1]:
        raise _damaged(path, f"holds values from {table.min()} to {table.max()}, not {limits[0]} to {limits[1]}")
    return Table(path, columns, rows, table, number + 1)


def _numbers(text: str, separator: str) -> np.ndarray | None:
    """Whole numbers; None where there is anything else, of which numpy warns."""
    try:
        return np.fromstring(text, np.int64, sep=separator)
    except (DeprecationWarning, ValueError):
        return None


def _lines(path: Path) -> Iterator[str]:
    """Every line that is not empty, without blanks around it."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head or not head.isascii() or head.lstrip().startswith(b"<") or b"\0" in head:
        raise _damaged(path, f"is {describe_kind(head)}")
    if path.stat().st_size > MAX_BYTES:
        raise _damaged(path, f"has more than {MAX_BYTES >> 20} MiB, which no list of CelebA has")
    with open(path, encoding="ascii", errors="replace") as file:
        yield from filter(None, map(str.strip, file))


def _count(path: Path, line: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", line):
        raise _damaged(path, f"begins with {line[:40]!r} instead of the number of its rows")
    return int(line)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; {downloads.REMEDY}")
