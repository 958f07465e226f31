"""A safetensors file, hashed while it is written, tensor by tensor.

safetensors' own `save` builds the whole file in memory once more and lets no other Python thread run while it copies
it; its `save_file` reports a full disk without an errno. The format is 8 bytes of header length, a JSON
header and the tensors' bytes (github.com/huggingface/safetensors, "Format"). Files are read with the library.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from shard_data.progress import advance

DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of dtypes, in the order in which the library stores them, so that all are aligned."""

CHUNK = 2**26
"""Bytes that are written and hashed at a time."""

_ORDER = {dtype: position for position, dtype in enumerate(DTYPES)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Write a new file of contiguous CPU tensors; it is on the disk when this returns its (sha256, bytes).

    The bytes are those of `safetensors.torch.save` with metadata {"format": "pt"}: equal tensors give equal bytes.
    Raises OSError.
    """
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for piece in _pieces(tensors):
            for start in range(0, len(piece), CHUNK):
                part = piece[start : start + CHUNK]
                digest.update(part)
                file.write(part)
                if len(part) == CHUNK:
                    os.fsync(file.fileno())  # on a slow disk a single fsync at the end could take very long
                advance()
        file.flush()
        os.fsync(file.fileno())
        return digest.hexdigest(), file.tell()


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    ordered = dict(sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])))
    yield _header(ordered)
    for tensor in ordered.values():
        yield _bytes_of(tensor)


def _header(ordered: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory itself, not a copy."""
    assert tensor.is_contiguous(), "not part of a snapshot"
    # Tensors of one element or none are contiguous whatever their stride, but cannot be viewed as bytes with another.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())
