"""The index of a shard: a .npy file with one row per sample, which is checked before anything is read by it."""

import hashlib
import io

import numpy as np

from pipeline.data.read_files import OpenFile, raise_fault
from shard_data.manifest import Manifest, Shard

MAX_HEADER = 2**14
MAX_KEY = 1024
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def load_index(file: OpenFile, entry: Shard, manifest: Manifest) -> np.ndarray:
    """The index, structured, (count,). Raises ValueError where it is not what the manifest says."""
    size = file.size()
    dtype, start = _parse_header(file.read(0, min(size, MAX_HEADER)), entry["count"])
    _check_columns(dtype, len(manifest["attributes"] or ()))
    expected = start + entry["count"] * dtype.itemsize
    if size != expected:
        raise ValueError(f"it has {size} bytes instead of {expected}")
    content = file.read(0, size)
    if hashlib.sha256(content).hexdigest() != entry["index_sha256"]:
        raise ValueError("its sha256 is not the manifest's")
    index = content[start:].view(dtype)
    _check_values(index, entry, manifest)
    return index


def _parse_header(head: np.ndarray, count: int) -> tuple[np.dtype, int]:
    """The type of a row, and where the rows begin."""
    stream = io.BytesIO(head)
    try:
        shape, _, dtype = HEADERS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # NumPy's parser raises many kinds
        raise_fault(error)
        raise ValueError("it is not a .npy file") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if shape != (count,) or not dtype.names:
        raise ValueError(f"it holds {str(dtype)[:200]} {shape} instead of {count} rows with key, offset and size")
    return dtype, stream.tell()


def _check_columns(dtype: np.dtype, num_attributes: int) -> None:
    expected = {
        "offset": np.dtype("<u8"),
        "size": np.dtype("<u4"),
        "label": np.dtype("<i4"),
        "attributes": np.dtype(("<i1", (num_attributes,))),
        "hidden": np.dtype(("?", (num_attributes,))),
    }
    missing = {"key", "offset", "size"} - set(dtype.names)
    if missing:
        raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    if dtype["key"].kind != "S" or dtype["key"].itemsize > MAX_KEY:
        raise ValueError(f"its keys are {dtype['key']}")
    for name, column in expected.items():
        if name in dtype.names and dtype[name] != column:
            raise ValueError(f"its column {name} is {dtype[name]}, the manifest's {column}")


def _check_values(index: np.ndarray, entry: Shard, manifest: Manifest) -> None:
    offsets, sizes = index["offset"], index["size"]
    outside = np.flatnonzero((offsets > entry["bytes"]) | (offsets + sizes > entry["bytes"]))
    if outside.size:
        key, offset = printable(index["key"][outside[0]]), offsets[outside[0]]
        raise ValueError(f"it places sample '{key}' at offset {offset}, outside the {entry['bytes']} bytes of the tar")
    names = index.dtype.names
    if "label" in names and manifest["classes"] is not None:
        _check_range("label", index["label"], len(manifest["classes"]) - 1)
    if "attributes" in names and manifest["attributes"]:
        _check_range("attributes", index["attributes"], 1)


def _check_range(name: str, values: np.ndarray, highest: int) -> None:
    if values.min() < -1 or values.max() > highest:
        raise ValueError(f"its column {name} holds {values.min()} to {values.max()}, allowed are -1 to {highest}")


def printable(key: bytes) -> str:
    """A sample's key without the characters that could disturb a terminal."""
    return "".join(filter(str.isprintable, key.decode(errors="replace")))
