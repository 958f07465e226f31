"""The files in which wandb keeps an attempt's records (`wandb/*run-*/run-*.wandb`), read as `wandb sync` reads them.

After 7 bytes that say what it is, such a file is a LevelDB log (github.com/google/leveldb, doc/log_format.md): blocks
of 32 KiB hold chunks, and a record is one chunk or several. A chunk has a CRC-32 of its kind and data, the length of
its data (both little endian), its kind, and its data.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

HEADER = b":W&B"
HEADER_SIZE = 7
BLOCK = 32768
CHUNK = struct.Struct("<IHB")
WHOLE, LAST = 1, 4


def record_files(run_dir: Path, run_id: str) -> list[Path]:
    """The files of all attempts of a run."""
    return sorted(run_dir.glob(f"wandb/*run-*/run-{run_id}.wandb"))


def is_offline(path: Path) -> bool:
    """Whether a file was kept for `wandb sync`, as its folder's name says."""
    return path.parent.name.startswith("offline-")


def whole_records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Each record (a serialised protocol buffer) and the offset of its end, up to the first that a kill tore."""
    position, parts = HEADER_SIZE, []
    while content.startswith(HEADER) and position + CHUNK.size <= len(content):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < CHUNK.size:  # filled with zeros
            position += left_in_block
            continue
        checksum, length, kind = CHUNK.unpack_from(content, position)
        data, end = position + CHUNK.size, position + CHUNK.size + length
        if end > len(content) or zlib.crc32(content[data - 1 : end]) != checksum:
            return
        parts.append(content[data:end])
        position = end
        if kind in (WHOLE, LAST):
            yield b"".join(parts), position
            parts = []


def cut_torn_end(path: Path) -> None:
    """Cut off what follows the last whole record. `wandb sync` would stop there, before the next attempt's file."""
    content = path.read_bytes()
    end = max((end for _, end in whole_records(content)), default=len(content))
    if end < len(content):
        os.truncate(path, end)


def mark_synced(path: Path) -> None:
    """Let `wandb sync` leave this file out."""
    path.with_name(path.name + ".synced").touch()
