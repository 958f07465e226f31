"""Image files in a folder, or in a ZIP file that is read without unpacking it to the disk."""

import errno
import os
import zlib
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

from shard_data.errors import BadImage, DataError
from shard_data.file_kinds import HEAD, describe_kind
from shard_data.files import open_regular

MAX_BYTES = 256 << 20  # of one image file
UNREADABLE = (errno.ENOENT, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EINVAL)
"""Errors of one file, which is skipped; EINVAL: a pipe or a device. Others are the disk's."""
LOCAL_HEADER = 30  # bytes of a ZIP member's local header before its name


class ImageFolder:
    """The files of one folder."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))

    def __getstate__(self) -> dict:
        return {"path": self.path}  # a worker does not need the names

    def place(self, name: str) -> None:
        """None, as `read` needs only the name."""

    def read(self, name: str, place: None = None) -> bytes:
        return read_file(f"{self.path}/{name}", name)


def read_file(path: str | Path, name: str) -> bytes:
    """The bytes of an image file. Raises BadImage if it cannot be read or is larger than MAX_BYTES."""
    try:
        with open_regular(Path(path), follow=True) as file:
            data = file.read() if os.fstat(file.fileno()).st_size <= MAX_BYTES else bytes(MAX_BYTES + 1)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise BadImage(name, f"cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise BadImage(name, f"more than {MAX_BYTES >> 20} MiB; no image of a data set is that large")
    return data


class Member(NamedTuple):
    """Position of a file in a ZIP archive. A worker gets it with each record, as the whole list takes 100 MB."""

    header: int
    packed: int
    size: int
    method: int
    crc: int


class ImageZip:
    """The files with one suffix in a ZIP archive, by their names without folders."""

    def __init__(self, path: Path, suffix: str):
        self.path, self.suffix = path, suffix

    def __getstate__(self) -> dict:
        return {"path": self.path, "suffix": self.suffix}  # each record has its member's place

    @cached_property
    def members(self) -> dict[str, Member]:
        try:
            with ZipFile(self.path) as archive:
                found = [info for info in archive.infolist() if info.filename.lower().endswith(self.suffix)]
        except (BadZipFile, NotImplementedError, ValueError) as error:
            with open(self.path, "rb") as file:
                what = describe_kind(file.read(HEAD))
            raise DataError(
                f"{self.path}: cannot be read as a ZIP file ({error}); it is {what}: fetch it again"
            ) from None
        found = [info for info in found if not info.filename.startswith("__MACOSX/")]
        members = {
            info.filename.rpartition("/")[2]: Member(
                info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
            )
            for info in found
        }
        if len(members) != len(found):
            raise DataError(f"{self.path}: holds several files of the same name; this is not the published archive")
        return members

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.members)

    def place(self, name: str) -> Member:
        return self.members[name]

    def read(self, name: str, member: Member) -> bytes:
        if member.size > MAX_BYTES or member.packed > MAX_BYTES:
            raise BadImage(name, f"more than {MAX_BYTES >> 20} MiB; no image of a data set is that large")
        data = _unpack(self._packed(member), member)
        if data is None or len(data) != member.size or zlib.crc32(data) != member.crc:
            raise BadImage(name, f"damaged in {self.path.name}")
        return data

    def _packed(self, member: Member) -> bytes:
        self._file.seek(data_start(self._file, member.header))
        return self._file.read(member.packed)

    @cached_property
    def _file(self) -> BinaryIO:
        return open(self.path, "rb")


def data_start(file: BinaryIO, header_offset: int) -> int:
    """Where the data of a ZIP member begins, whose local header is at `header_offset`."""
    file.seek(header_offset)
    header = file.read(LOCAL_HEADER)
    name_and_extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return header_offset + LOCAL_HEADER + name_and_extra


def _unpack(packed: bytes, member: Member) -> bytes | None:
    """The content, at most one byte more than the member's size; None if damaged or compressed by another method."""
    if member.method == ZIP_STORED:
        return packed
    if member.method != ZIP_DEFLATED:
        return None
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, member.size + 1)
    except zlib.error:
        return None
