"""A checkpoint that `torch.save` pickled, such as NVAE's reference release writes: read without running what is in it.

Two things protect the reader. Before torch sees the file, its zip directory and the globals that its pickle names are
compared with what such a checkpoint needs: torch's own list for `weights_only` also has functions that allocate any
amount. And tensors are mapped from the file instead of being read, so that those that nobody uses need no memory.
"""

import argparse
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pipeline.storage.atomic import atomic_file
from shard_data.files import open_regular

MAX_DIRECTORY_BYTES, MAX_PICKLE_BYTES = 2**24, 2**23
"""Of the zip directory, and of a member that is not a tensor. The largest published model needs a tenth of them."""
GLOBALS = {
    "argparse Namespace",
    "collections OrderedDict",
    "torch FloatStorage",
    "torch LongStorage",
    "torch._utils _rebuild_tensor_v2",
}
"""What the pickle may name: options, dictionaries of tensors, and tensors of float32 and int64."""
OTHER_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"}
"""Other ways to name a global; torch.save does not use them."""

_LOCAL_HEADER, _END, _END64, _LOCATOR64 = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


class UnreadablePickle(ValueError):
    """A file is no checkpoint of torch.save, is damaged, or holds what a checkpoint does not need."""


def read_pickled(path: Path) -> Any:
    """What `torch.save` wrote to the file. Its tensors are views of the file, which must stay as it is while they live.

    Nothing in the file can run code, and the memory needed is in proportion to its size. Raises UnreadablePickle, which
    names the file and the problem, and OSError.
    """
    try:
        with open_regular(path, follow=True) as file:
            _check_globals(_read_pickle(file))
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # a forged pickle can raise anything
        raise UnreadablePickle(f"{path}: {_reason(error)}") from None


def write_pickled(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file with `torch.save`, completely or not at all. Makes its folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(content, file)


def check_tensor(name: str, tensor: Any, max_bytes: int) -> Tensor:
    """A plain tensor whose elements all lie in the file, of at most `max_bytes`. Raises ValueError."""
    is_plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not is_plain:
        raise ValueError(f"{name[:100]!r} is not a tensor")
    if tensor.nbytes > min(tensor.untyped_storage().nbytes(), max_bytes):
        raise ValueError(f"{name[:100]!r} has more elements than the file holds")
    return tensor


# ---- the zip archive ------------------------------------------------------------------------------------------------


def _read_pickle(file: BinaryIO) -> bytes:
    """The pickle of the archive. Raises UnreadablePickle for another kind of file, and for one that is damaged.

    Python and torch read the archive on their own. Everything in which they could differ is refused.
    """
    if file.read(4) != _LOCAL_HEADER:
        raise UnreadablePickle(
            "not a checkpoint that torch.save has written since torch 1.6 (a zip archive); an older one can be saved "
            "again, where it is trusted, with torch.save(torch.load(FILE), NEW_FILE)"
        )
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        for member in members:
            _check_member(member)
        names = {member.filename.lower() for member in members}
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(names) < len(members) or len(pickles) != 1:
            raise UnreadablePickle("not a checkpoint of torch.save: its archive has not one data.pkl")
        broken = archive.testzip()
        if broken is not None:
            raise UnreadablePickle(f"damaged: the checksum of {broken[:80]!r} is wrong")
        return archive.read(pickles[0])


def _check_directory(file: BinaryIO) -> None:
    """Raises UnreadablePickle unless the archive ends with one directory of moderate size, as torch.save writes it."""
    size = file.seek(0, 2)
    file.seek(max(size - 98, 0))
    tail = file.read().rjust(98, b"\0")
    end64, locator, end = tail[:56], tail[56:76], tail[76:]
    if end[:4] != _END or end[-2:] != b"\0\0":
        raise UnreadablePickle("truncated, or not a checkpoint of torch.save: its archive has no directory at its end")
    length, start, stop = *struct.unpack("<II", end[12:20]), size - 22
    if locator[:4] == _LOCATOR64:
        stop = size - 98
        if end64[:4] != _END64 or struct.unpack("<Q", locator[8:16])[0] != stop:
            raise UnreadablePickle("not a checkpoint of torch.save: its archive has two directories")
        length, start = struct.unpack("<QQ", end64[40:56])
    if start + length != stop or length > MAX_DIRECTORY_BYTES:
        raise UnreadablePickle("not a checkpoint of torch.save: the directory of its archive has an impossible size")


def _check_member(member: zipfile.ZipInfo) -> None:
    """Raises UnreadablePickle for what torch.save does not write: a compressed or encrypted member, an odd name."""
    name = member.orig_filename
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
        raise UnreadablePickle(f"not a checkpoint of torch.save: {name[:80]!r} is compressed")
    if name != member.filename or not name.isascii() or not name.isprintable():
        raise UnreadablePickle("not a checkpoint of torch.save: a name in its archive has odd characters")
    if "/data/" not in name and member.file_size > MAX_PICKLE_BYTES:
        raise UnreadablePickle(f"{name[:80]!r} takes {member.file_size} bytes; at most {MAX_PICKLE_BYTES} are read")


# ---- the pickle -----------------------------------------------------------------------------------------------------


def _check_globals(pickle: bytes) -> None:
    """Raises UnreadablePickle for a pickle that names another function or class than a checkpoint needs."""
    others = sorted(set(_globals_of(pickle)) - GLOBALS)
    if others:
        raise UnreadablePickle(
            f"refused, and nothing of it was run: it names {', '.join(others[:5])[:200]}, which a checkpoint of the "
            "release does not need"
        )


def _globals_of(pickle: bytes) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            yield argument
        elif opcode.name in OTHER_OPCODES:
            yield f"a global by {opcode.name}"


def _reason(error: Exception) -> str:
    """The first line of the message in printable characters: parts of it come from the file."""
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    kind = "" if isinstance(error, UnreadablePickle) else "not a checkpoint that can be read: "
    return kind + "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:400])
