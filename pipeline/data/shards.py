"""Random access to the samples of a shard set: bytes at known offsets of memory-mapped tars.

The format is that of docs/architecture.md. Opening reads the manifest alone; a shard's index and tar are opened when a
sample of it is first asked for.
"""

import hashlib
import io
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.manifest import Manifest, ShardEntry, load_manifest
from pipeline.data.recent import Recent

# Two files each, and a process may commonly hold 1,024.
MAX_OPEN_SHARDS = 256
PNG_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

REMEDY = "Copy or make the shard set again; python -m shard_data verify DIR lists all damage"

Indices = Sequence[int] | np.ndarray


class DamagedShard(ValueError):
    """A shard that is not what its manifest says. The message names the shard, the sample and the offset in the tar."""


class TarShards:
    """One split of a shard set. Samples are numbered through its shards in the manifest's order, from 0.

    Safe to hand to worker processes, forked or spawned: open files stay behind and are opened again there. Every method
    that takes indices (n,) raises IndexError outside 0..len-1, and DamagedShard where the files are not what the
    manifest says.
    """

    def __init__(self, root: str | Path, split: str):
        """Raises ValueError when `root` is no complete shard set or has no such split."""
        self.root = Path(root)
        self.split = split
        self.manifest = load_manifest(self.root)
        if split not in self.manifest.splits:
            raise ValueError(f"{self.root}: no split '{split}'; it has: {', '.join(self.manifest.splits)}")
        self.shard_sizes = tuple(shard.count for shard in self._entries)
        self._starts = np.cumsum((0, *self.shard_sizes))  # (S + 1,)
        self._open = Recent(MAX_OPEN_SHARDS)

    @property
    def _entries(self) -> list[ShardEntry]:
        return self.manifest.splits[self.split].shards

    def __len__(self) -> int:
        return self.manifest.splits[self.split].count

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        image = self.manifest.image
        return image.height, image.width, image.channels

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; empty when the set has none."""
        return tuple(self.manifest.classes or ())

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the binary attributes; empty when the set has none."""
        return tuple(self.manifest.attributes or ())

    @property
    def fingerprint(self) -> str:
        """The sha256 that stands for the content of the whole set."""
        return self.manifest.fingerprint

    def images(self, indices: Indices) -> np.ndarray:
        """Images (n, H, W, C) uint8, C-contiguous."""
        out = np.empty((len(indices), *self.image_shape), np.uint8)
        for shard, here, rows in self._by_shard(indices):
            out[here] = shard.images(rows)
        return out

    def keys(self, indices: Indices) -> list[str]:
        """The samples' names, unique within the set."""
        out = [""] * len(indices)
        for shard, here, rows in self._by_shard(indices):
            for place, row in zip(here.tolist(), rows.tolist(), strict=True):
                out[place] = shard.key(row)
        return out

    def labels(self, indices: Indices) -> np.ndarray:
        """Class numbers (n,) int64; -1 where a sample, or the whole set, has none."""
        return self._column("label", indices, np.full(len(indices), -1, np.int64))

    def attributes(self, indices: Indices) -> np.ndarray:
        """Attributes (n, A) int8: 1 present, 0 absent, -1 unknown. A is 0 for a set without attributes."""
        return self._column("attributes", indices, np.full((len(indices), len(self.attribute_names)), -1, np.int8))

    def _column(self, name: str, indices: Indices, out: np.ndarray) -> np.ndarray:
        for shard, here, rows in self._by_shard(indices):
            if name in shard.index.dtype.names:
                out[here] = shard.index[name][rows]
        return out

    def _by_shard(self, indices: Indices) -> Iterator[tuple["_OpenShard", np.ndarray, np.ndarray]]:
        """Each shard concerned, the places (k,) of its samples among `indices`, and their rows (k,) in the shard."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(
                f"indices {indices.min()}..{indices.max()} asked of split '{self.split}' with {len(self)} samples"
            )
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            shard = self._open.get(number, lambda n=number: _OpenShard(self.root, self._entries[n], self.manifest))
            yield shard, here, indices[here] - self._starts[number]


class _OpenShard:
    """One shard: its index, and its tar once an image is asked for."""

    def __init__(self, root: Path, entry: ShardEntry, manifest: Manifest):
        image = manifest.image
        self.entry = entry
        self.path = root / entry.file
        self.encoding = manifest.encoding
        self.image_shape = (image.height, image.width, image.channels)
        self.index = _load_index(root / entry.index, entry, len(manifest.attributes or ()))
        self._map: mmap.mmap | None = None

    def key(self, row: int) -> str:
        return self.index["key"][row].decode()

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images (k, H, W, C) uint8 of the samples in these rows (k,), k at least 1."""
        if self._map is None:
            self._open_tar(rows[0])
        # Reading a mapped file that has been cut short since kills the process, so look before each batch.
        if self._map.size() != self.entry.bytes:
            raise self._damaged(
                rows[0], f"the file has {self._map.size()} bytes now, the manifest says {self.entry.bytes}"
            )
        if self.encoding == "npy":
            return self._npy_images(rows)
        return np.stack([self._png_image(row) for row in rows])

    def _open_tar(self, wanted: int) -> None:
        try:
            size = self.path.stat().st_size
            if size != self.entry.bytes:
                raise self._damaged(wanted, f"the file has {size} bytes, the manifest says {self.entry.bytes}")
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._damaged(wanted, f"{error.strerror}") from error
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._check_places()
        if self.encoding == "npy":
            self._header = self._npy_header()

    def _check_places(self) -> None:
        ends = self.index["offset"] + self.index["size"]
        outside = np.flatnonzero(ends > self.entry.bytes)
        if outside.size:
            raise self._damaged(outside[0], "the index places it outside the file")

    def _record(self, row: int) -> bytes:
        offset = int(self.index["offset"][row])
        return self._map[offset : offset + int(self.index["size"][row])]

    def _npy_header(self) -> np.ndarray:
        """The .npy header that every sample of the shard must begin with: the first one's, once it is found to fit."""
        record = self._record(0)
        try:
            image = np.load(io.BytesIO(record), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise self._damaged(0, f"not an .npy file ({error})") from error
        if image.dtype != np.uint8 or image.shape != self.image_shape or not image.flags.c_contiguous:
            raise self._damaged(
                0, f"holds {image.dtype} {image.shape}, the manifest says uint8 {self.image_shape} in C order"
            )
        odd = np.flatnonzero(self.index["size"] != len(record))
        if odd.size:
            raise self._damaged(
                odd[0], f"{self.index['size'][odd[0]]} bytes, but the shard's first sample has {len(record)}"
            )
        return np.frombuffer(record, np.uint8, len(record) - image.nbytes)

    def _npy_images(self, rows: np.ndarray) -> np.ndarray:
        """Straight copies out of the map; the headers are compared, not parsed."""
        records = np.empty((len(rows), self.index["size"][0]), np.uint8)
        for record, offset in zip(records, self.index["offset"][rows].tolist(), strict=True):
            record[:] = self._bytes[offset : offset + len(record)]
        headers = records[:, : len(self._header)]
        wrong = np.flatnonzero((headers != self._header).any(axis=1))
        if wrong.size:
            raise self._damaged(rows[wrong[0]], "its .npy header is damaged")
        return records[:, len(self._header) :].reshape(-1, *self.image_shape)

    def _png_image(self, row: int) -> np.ndarray:
        height, width, channels = self.image_shape
        try:
            with Image.open(io.BytesIO(self._record(row)), formats=["PNG"]) as image:
                if image.size != (width, height) or image.mode != PNG_MODES[channels]:
                    raise ValueError(f"{image.mode} of {image.size}, the manifest says {self.image_shape}")
                return np.asarray(image).reshape(self.image_shape)
        except Exception as error:  # Pillow's decoder raises many kinds for broken files; each of them means damage
            raise self._damaged(row, f"not the PNG that it should be ({error})") from error

    def _damaged(self, row: int, problem: str) -> DamagedShard:
        offset = self.index["offset"][row]
        return DamagedShard(f"{self.path}: sample '{self.key(row)}' at offset {offset}: {problem}. {REMEDY}")


def _load_index(path: Path, entry: ShardEntry, num_attributes: int) -> np.ndarray:
    """The shard's index, memory-mapped: structured, (count,). Hashed first, as a wrong label would not show later."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.index_sha256:
            raise ValueError("its sha256 is not the manifest's")
        index = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        _check_index(index, entry.count, num_attributes)
    except OSError as error:
        raise _damaged_index(path, entry, error.strerror or str(error)) from error
    except ValueError as error:
        raise _damaged_index(path, entry, str(error)) from error
    return index


def _check_index(index: np.ndarray, count: int, num_attributes: int) -> None:
    names = index.dtype.names or ()
    if index.shape != (count,) or not {"key", "offset", "size"} <= set(names):
        raise ValueError(f"{index.dtype} {index.shape}, but it should be {count} rows with key, offset and size")
    if "attributes" in names and index.dtype["attributes"].shape != (num_attributes,):
        raise ValueError(f"attributes {index.dtype['attributes'].shape}, but the manifest names {num_attributes}")


def _damaged_index(path: Path, entry: ShardEntry, problem: str) -> DamagedShard:
    return DamagedShard(f"{path}: {problem}; it places the {entry.count} samples of {entry.file}. {REMEDY}")
