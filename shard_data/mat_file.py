"""Reads one matrix of zeros and ones from a MATLAB file of level 5 (`save -v6` or `-v7`), and nothing else of it.

Format: "MAT-File Format", MathWorks, chapter 1. The file is read once, in pieces: the memory needed is that of the
matrix as uint8, whatever the file says.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from shard_data.errors import DataError
from shard_data.file_kinds import HEAD, describe_kind

MATRIX, COMPRESSED, INT32, UINT32 = 14, 15, 5, 6
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
NUMERIC = range(6, 16)
"""The classes of arrays of numbers."""
CHUNK = 2**20
MAX_DIMENSIONS, MAX_NAME = 8, 256
FIX = "save one matrix of zeros and ones with -v7 in MATLAB, or scipy.io.savemat"

Read = Callable[[int], bytes]


class NotReadable(ValueError):
    """What is wrong with the file."""


class Matrix(NamedTuple):
    """An array of numbers whose values come next."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    num_bytes: int
    small: bytes
    """The values, if they are so few that they stand beside their type."""


def read_binary_matrix(path: Path, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) uint8 of zeros and ones, from the file's one matrix of rows x columns or columns x rows.

    Raises DataError for any other file.
    """
    try:
        with open(path, "rb") as file:
            return _read_file(file, rows, columns)
    except NotReadable as error:
        raise DataError(f"{path}: {error}; {FIX}") from None
    except zlib.error as error:
        raise DataError(f"{path}: damaged ({error}); {FIX}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_file(file: BinaryIO, rows: int, columns: int) -> np.ndarray:
    head = file.read(128)
    order = {b"IM": "<", b"MI": ">"}.get(head[126:128])
    if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
        raise NotReadable("a MATLAB file of version 7.3 (HDF5), which is not read")
    if order is None or struct.unpack(order + "H", head[124:126]) != (0x0100,):
        raise NotReadable(f"{describe_kind(head[:HEAD])}, not a MATLAB file of level 5")
    found, others = None, []
    for read in _elements(file, order):
        matrix = _matrix(read, order)
        if matrix is None or matrix.shape not in ((rows, columns), (columns, rows)):
            others += [] if matrix is None else [f"{matrix.name} {' x '.join(map(str, matrix.shape))}"]
        elif found is not None:
            raise NotReadable(f"holds more than one matrix of {rows} x {columns}")
        else:
            found = _values(read, matrix, rows, columns)
    if found is None:
        held = f"; it holds {', '.join(others)[:500]}" if others else ""
        raise NotReadable(f"holds no matrix of {rows} x {columns} or {columns} x {rows}{held}")
    return found


def _elements(file: BinaryIO, order: str) -> Iterator[Read]:
    """A reader of the content of each array in the file, which raises NotReadable at its end."""
    while tag := file.read(8):
        if len(tag) < 8:
            raise NotReadable("truncated")
        kind, size = struct.unpack(order + "II", tag)
        end = file.tell() + size
        if kind == COMPRESSED:
            read = _inflating(file, size)
            kind, _ = struct.unpack(order + "II", read(8))
        else:
            read = _limited(file, size)
        if kind != MATRIX:
            raise NotReadable(f"holds an element of type {kind}, which is not an array")
        yield read
        file.seek(end)


def _limited(file: BinaryIO, size: int) -> Read:
    left = size

    def read(count: int) -> bytes:
        nonlocal left
        data = file.read(count) if count <= left else b""
        left -= count
        if len(data) < count:
            raise NotReadable("truncated")
        return data

    return read


def _inflating(file: BinaryIO, size: int) -> Read:
    """Inflates what is read, and no more: little data can unpack to much."""
    packed, inflater = _limited_chunks(file, size), zlib.decompressobj()

    def read(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            chunk = inflater.unconsumed_tail or next(packed, b"")
            piece = inflater.decompress(chunk, count - len(data))
            if not piece and not chunk:
                raise NotReadable("truncated")
            data += piece
        return bytes(data)

    return read


def _limited_chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(CHUNK, size))):
        size -= len(chunk)
        yield chunk


def _matrix(read: Read, order: str) -> Matrix | None:
    """The description of an array; None for one that does not hold real numbers."""
    kind, flags = _part(read, order, 8)
    if kind != UINT32 or len(flags) != 8:
        raise NotReadable("an array without flags")
    (bits,) = struct.unpack(order + "I", flags[:4])
    if bits & 0xFF not in NUMERIC or bits & 0x0800:  # a complex array, too, is none of ours
        return None
    kind, dimensions = _part(read, order, 4 * MAX_DIMENSIONS)
    if kind != INT32 or len(dimensions) % 4:
        raise NotReadable("an array without dimensions")
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
    _, name = _part(read, order, MAX_NAME)
    kind, size, small = _tag(read, order)
    if kind not in TYPES:
        raise NotReadable(f"an array with values of type {kind}")
    text = "".join(filter(str.isprintable, name.decode("ascii", "replace")))
    return Matrix(text, shape, np.dtype(order + TYPES[kind]), size, small)


def _part(read: Read, order: str, limit: int) -> tuple[int, bytes]:
    """The type and the content of a small part of an array, of at most `limit` bytes."""
    kind, size, small = _tag(read, order)
    if size > limit:
        raise NotReadable(f"an array with a part of {size} bytes, where {limit} are the most")
    return kind, small if small or not size else read(size + -size % 8)[:size]


def _tag(read: Read, order: str) -> tuple[int, int, bytes]:
    """The type of a part, its number of bytes, and its content where that stands in the tag."""
    tag = read(8)
    kind, size = struct.unpack(order + "II", tag)
    if kind >> 16:
        kind, size = kind & 0xFFFF, kind >> 16
        if size > 4:
            raise NotReadable("a part with more content than its tag holds")
        return kind, size, tag[4 : 4 + size]
    return kind, size, b""


def _values(read: Read, matrix: Matrix, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) uint8. MATLAB stores column after column."""
    count = rows * columns
    if matrix.num_bytes != count * matrix.dtype.itemsize or matrix.small:
        raise NotReadable(f"{matrix.name} has {matrix.num_bytes} bytes for {count} values of {matrix.dtype}")
    out, step = np.empty(count, np.uint8), CHUNK // matrix.dtype.itemsize
    for start in range(0, count, step):
        size = min(step, count - start)
        values = np.frombuffer(read(size * matrix.dtype.itemsize), matrix.dtype)
        wrong = values[(values != 0) & (values != 1)]
        if len(wrong):
            raise NotReadable(f"{matrix.name} holds the value {wrong[0]:g}, where all are 0 or 1")
        out[start : start + size] = values
    return out.reshape(columns, rows).T if matrix.shape == (rows, columns) else out.reshape(rows, columns)
