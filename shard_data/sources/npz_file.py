"""The arrays of a .npz file, read without pickle and in bounded memory."""

import io
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from shard_data.errors import DataError
from shard_data.file_kinds import HEAD, describe_kind
from shard_data.sources.image_files import data_start

CHUNK = 1 << 20
FAULTS = (BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error)


@dataclass(frozen=True)
class NpzFile:
    """A file as `numpy.savez` writes it. All errors are DataError, with the file and `fix`, what to do about it."""

    path: Path
    wanted: Collection[str]
    """Names of the arrays that are read."""
    max_unpacked: int
    """Bytes of a compressed array at most: it is held in memory."""
    fix: str
    ignored: Collection[str] | None = None
    """Names of arrays that may be there and are not read; None: any others may."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Those of the wanted arrays that the file has: memory-mapped if stored, unpacked if compressed."""
        with self._archive() as archive:
            return {name: self._open(archive, member, name) for name, member in self._members(archive).items()}

    def check_sums(self) -> None:
        """Reads the wanted arrays once, in chunks, and compares them with their checksums."""
        with self._archive() as archive:
            for member in self._members(archive).values():
                with archive.open(member) as file:
                    while file.read(CHUNK):
                        pass

    def is_compressed(self) -> bool:
        """Whether a wanted array can only be read from its start, and as a whole."""
        with self._archive() as archive:
            return any(member.compress_type != ZIP_STORED for member in self._members(archive).values())

    @contextmanager
    def _archive(self) -> Iterator[ZipFile]:
        try:
            with ZipFile(self.path) as archive:
                yield archive
        except FAULTS as error:
            raise DataError(f"{self.path}: not a .npz file, or damaged ({error}){self._kind()}; {self.fix}") from None

    def _kind(self) -> str:
        """What the file is instead of a ZIP archive, if it can be read."""
        try:
            with open(self.path, "rb") as file:
                head = file.read(HEAD)
        except OSError:
            return ""
        return "" if head.startswith(b"PK") else f"; it is {describe_kind(head)}"

    def _members(self, archive: ZipFile) -> dict[str, ZipInfo]:
        known = None if self.ignored is None else [f"{name}.npy" for name in (*self.wanted, *self.ignored)]
        members: dict[str, ZipInfo] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if known is not None and member.filename not in known:
                what = f"array {name!r}" if member.filename.endswith(".npy") else f"member {member.filename!r}"
                names = ", ".join((*self.wanted, *self.ignored))
                raise DataError(f"{self.path}: unknown {what}; known: {names}")
            if name in members:
                raise DataError(f"{self.path}: holds the array {name!r} twice")
            members[name] = member
        return {name: member for name, member in members.items() if name in self.wanted}

    def _open(self, archive: ZipFile, member: ZipInfo, name: str) -> np.ndarray:
        try:
            with archive.open(member) as file:
                shape, fortran, dtype = _read_header(file)
                start = file.tell()
        except ValueError as error:
            raise DataError(f"{self.path}: the array {name!r} is not a readable .npy ({error})") from None
        if dtype.hasobject:
            what = "holds Python objects, which are not read; give numbers or strings"
            raise DataError(f"{self.path}: the array {name!r} {what}")
        size = member.file_size - start
        if prod(shape) * dtype.itemsize != size or size < 1:
            raise DataError(f"{self.path}: the array {name!r} has shape {shape}, but {size} bytes of data")
        order = "F" if fortran else "C"
        if member.compress_type == ZIP_STORED:
            return np.memmap(self.path, dtype, "r", _data_offset(self.path, archive, member) + start, shape, order)
        if member.compress_type != ZIP_DEFLATED or member.file_size > self.max_unpacked:
            raise DataError(
                f"{self.path}: the array {name!r} is compressed and {member.file_size >> 20} MiB large; "
                "write it with numpy.savez, which does not compress"
            )
        return _unpack(archive, member, start).view(dtype).reshape(shape, order=order)


def _read_header(file: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format")
    return readers[version](file)


def _data_offset(path: Path, archive: ZipFile, member: ZipInfo) -> int:
    """Where a stored member's bytes begin in the file."""
    with path.open("rb") as file:
        offset = data_start(file, member.header_offset)
    if offset + member.file_size > path.stat().st_size or member.compress_size != member.file_size:
        raise BadZipFile(f"{member.filename} extends beyond the end of the file")
    return offset


def _unpack(archive: ZipFile, member: ZipInfo, start: int) -> np.ndarray:
    """The bytes of a compressed member from `start` on, in memory once."""
    content = np.empty(member.file_size - start, np.uint8)
    with archive.open(member) as file:
        file.read(start)
        place = 0
        while chunk := file.read(CHUNK):
            content[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
            place += len(chunk)
    if place != len(content):
        raise BadZipFile(f"{member.filename} is truncated")
    return content
