"""Random access to the samples of a shard set: bytes at known offsets of memory-mapped tars.

The format is that of docs/architecture.md. Opening reads the manifest alone; a shard's index and tar are opened when a
sample of it is first asked for.
"""

import io
import mmap
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.lru_cache import LRUCache
from shard_data import manifest as manifests
from shard_data.files import sha256
from shard_data.manifest import Manifest, Shard

# Two files each, and a process may commonly hold 1,024.
MAX_OPEN_SHARDS = 256
# A shard with one damaged sample, be it the first, gives the others.
HEADERS_TRIED = 8
PNG_MODES = {1: "L", 3: "RGB"}

Indices = Sequence[int] | np.ndarray


class UnreadableShard(ValueError):
    """A shard that is not what its manifest says. The message names the shard, the sample and the offset in the tar."""


class TarShards:
    """One split of a shard set. Samples are numbered through its shards in the manifest's order, from 0.

    Safe to hand to worker processes, forked or spawned: open files stay behind and are opened again there. Every method
    that takes indices (n,) raises IndexError outside 0..len-1, and UnreadableShard where the files are not what the
    manifest says.
    """

    def __init__(self, root: str | Path, split: str, verify: bool = False, origin: str | None = None):
        """`verify`: compare the sha256 of each tar with the manifest's when it is first opened, 0.5 to 2 GB/s; else
        changed pixels of a .npy are not noticed. `origin`: the address from which `root` was fetched, for messages.

        Raises ValueError when `root` is no complete shard set or has no such split.
        """
        self.root = Path(root)
        self.split = split
        self.verify = verify
        self.remedy = (
            f"Delete {self.root}; it is fetched again from {origin}"
            if origin
            else f"Copy or make the shard set again; all damage is listed by: python -m shard_data verify {self.root}"
        )
        self.manifest = manifests.load(self.root)
        if split not in self.manifest["splits"]:
            raise ValueError(f"{self.root}: no split '{split}'; it has: {', '.join(self.manifest['splits'])}")
        self._entries = self.manifest["splits"][split]["shards"]
        self.shard_sizes = tuple(shard["count"] for shard in self._entries)
        self._starts = np.cumsum((0, *self.shard_sizes))  # (S + 1,)
        self._indexes = LRUCache(MAX_OPEN_SHARDS)
        self._tars = LRUCache(MAX_OPEN_SHARDS)
        self._sound: dict[int, bool] = {}  # of the tars that were hashed: whether the hash is the manifest's

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return _image_shape(self.manifest)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; empty when the set has none."""
        return tuple(self.manifest["classes"] or ())

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the binary attributes; empty when the set has none."""
        return tuple(self.manifest["attributes"] or ())

    @property
    def fingerprint(self) -> str:
        """The sha256 that stands for the content of the whole set."""
        return self.manifest["fingerprint"]

    def images(self, indices: Indices) -> np.ndarray:
        """Images (n, H, W, C) uint8, C-contiguous."""
        out = np.empty((len(indices), *self.image_shape), np.uint8)
        for number, here, rows in self._by_shard(indices):
            out[here] = self._tar(number, rows[0]).images(rows)
        return out

    def keys(self, indices: Indices) -> list[str]:
        """The samples' names, unique within the set."""
        out = [""] * len(indices)
        for number, here, rows in self._by_shard(indices):
            for place, key in zip(here.tolist(), self._index(number)["key"][rows].tolist(), strict=True):
                out[place] = key.decode()
        return out

    def labels(self, indices: Indices) -> np.ndarray:
        """Class numbers (n,) int64; -1 where a sample, or the whole set, has none."""
        return self._column("label", indices, np.full(len(indices), -1, np.int64))

    def attributes(self, indices: Indices) -> np.ndarray:
        """Attributes (n, A) int8: 1 present, 0 absent, -1 unknown. A is 0 for a set without attributes."""
        return self._column("attributes", indices, np.full((len(indices), len(self.attribute_names)), -1, np.int8))

    def hidden(self, indices: Indices) -> np.ndarray:
        """Which attributes the images cannot show, present or not (n, A) bool; none in a set that does not say."""
        return self._column("hidden", indices, np.zeros((len(indices), len(self.attribute_names)), bool))

    def _column(self, name: str, indices: Indices, out: np.ndarray) -> np.ndarray:
        for number, here, rows in self._by_shard(indices):
            index = self._index(number)
            if name in index.dtype.names:
                out[here] = index[name][rows]
        return out

    def _by_shard(self, indices: Indices) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Per shard concerned: its number, the places (k,) of its samples in `indices`, their rows (k,) in it."""
        indices = self._checked(indices, int(self._starts[-1]))
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            yield number, here, indices[here] - self._starts[number]

    def _checked(self, indices: Indices, count: int) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < count):
            raise IndexError(
                f"indices {indices.min()}..{indices.max()} asked of split '{self.split}' with {count} samples"
            )
        return indices

    def _index(self, number: int) -> np.ndarray:
        entry, remedy = self._entries[number], self.remedy
        num_attributes = len(self.attribute_names)
        return self._indexes.get(number, lambda: _load_index(self.root, entry, num_attributes, remedy))

    def _tar(self, number: int, wanted: int) -> "_Tar":
        return self._tars.get(number, lambda: self._open_tar(number, wanted))

    def _open_tar(self, number: int, wanted: int) -> "_Tar":
        entry, index = self._entries[number], self._index(number)
        tar = _Tar(self.root, entry, index, self.manifest, self.remedy, wanted)
        if self.verify:
            if number not in self._sound:  # remembered, as a bad shard may be asked for again and again
                self._sound[number] = tar.has_hash()
            if not self._sound[number]:
                raise tar.damaged(wanted, "some bytes of the shard were changed: its sha256 is not the manifest's")
        return tar


class Subset(TarShards):
    """Some samples of a split under a name of their own, in the split's order and numbered from 0."""

    def __init__(
        self,
        root: str | Path,
        split: str,
        members: np.ndarray,
        name: str,
        verify: bool = False,
        origin: str | None = None,
    ):
        """`members`: the samples' indices in `split`, ascending (n,) int64. For the others see TarShards."""
        super().__init__(root, split, verify, origin)
        self.split = name
        self._members = self._checked(members, int(self._starts[-1]))
        numbers = np.searchsorted(self._starts, self._members, side="right") - 1
        self.shard_sizes = tuple(size for size in np.bincount(numbers).tolist() if size)

    def __len__(self) -> int:
        return len(self._members)

    def _by_shard(self, indices: Indices) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        return super()._by_shard(self._members[self._checked(indices, len(self))])


def _image_shape(manifest: Manifest) -> tuple[int, int, int]:
    image = manifest["image"]
    return image["height"], image["width"], image["channels"]


def _load_index(root: Path, entry: Shard, num_attributes: int, remedy: str) -> np.ndarray:
    """The shard's index, memory-mapped: structured, (count,). Hashed first, as a wrong label would not show later."""
    path = root / entry["index"]
    try:
        if sha256(path) != entry["index_sha256"]:
            raise ValueError("its sha256 is not the manifest's")
        index = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        _check_index(index, entry["count"], num_attributes)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        lost = f"so the {entry['count']} samples of {entry['file']} cannot be found"
        raise UnreadableShard(f"{path}: {problem}, {lost}. {remedy}") from error
    return index


def _check_index(index: np.ndarray, count: int, num_attributes: int) -> None:
    fields = index.dtype.fields or {}
    kinds = {name: fields[name][0].str for name in ("offset", "size") if name in fields}
    if index.shape != (count,) or "key" not in fields or kinds != {"offset": "<u8", "size": "<u4"}:
        raise ValueError(f"holds {index.dtype} {index.shape} instead of {count} rows with key, offset and size")
    if "attributes" in fields and index.dtype["attributes"].shape != (num_attributes,):
        raise ValueError(f"its attributes are {index.dtype['attributes'].shape}, the manifest's {num_attributes}")


class _Tar:
    """The images of one shard."""

    def __init__(self, root: Path, entry: Shard, index: np.ndarray, manifest: Manifest, remedy: str, wanted: int):
        """`wanted` is the row that an error names when the whole file is unusable."""
        self.root = root
        self.entry = entry
        self.index = index
        self.remedy = remedy
        self.encoding = manifest["encoding"]
        self.image_shape = _image_shape(manifest)
        self._map = self._open(wanted)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._check_places()
        if self.encoding == "npy":
            self._header = self._npy_header()

    def has_hash(self) -> bool:
        """Whether the file's sha256 is the manifest's."""
        try:
            return sha256(self.root / self.entry["file"]) == self.entry["sha256"]
        except OSError:
            return False

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images (k, H, W, C) uint8 of the samples in these rows (k,), k at least 1."""
        # Reading a mapped file that has been cut short since kills the process, so look before each batch.
        self._check_size(self._map.size(), rows[0])
        if self.encoding == "npy":
            return self._npy_images(rows)
        return np.stack([self._png_image(row) for row in rows])

    def _open(self, wanted: int) -> mmap.mmap:
        path = self.root / self.entry["file"]
        try:
            self._check_size(path.stat().st_size, wanted)
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self.damaged(wanted, f"{error.strerror}") from error

    def _check_size(self, size: int, wanted: int) -> None:
        if size != self.entry["bytes"]:
            raise self.damaged(wanted, f"the file has {size} bytes, the manifest says {self.entry['bytes']}")

    def _check_places(self) -> None:
        offsets, end = self.index["offset"], self.entry["bytes"]
        outside = np.flatnonzero((offsets > end) | (offsets + self.index["size"] > end))
        if outside.size:
            raise self.damaged(outside[0], f"the index places it outside the file's {end} bytes")

    def _record(self, row: int) -> bytes:
        """The image member's data as they lie in the tar."""
        offset = int(self.index["offset"][row])
        return self._map[offset : offset + int(self.index["size"][row])]

    def _npy_header(self) -> np.ndarray:
        """The .npy header that every sample of the shard must begin with: the first that is found to fit."""
        problems = []
        for row in range(min(HEADERS_TRIED, len(self.index))):
            try:
                header = self._parsed_header(row)
            except Exception as error:  # a broken header makes NumPy's parser raise many kinds; each means damage
                problems.append(error)
                continue
            self._check_equal_sizes(len(header) + prod(self.image_shape))
            return header
        raise self.damaged(0, f"not the .npy that it should be ({problems[0]})") from problems[0]

    def _parsed_header(self, row: int) -> np.ndarray:
        record = io.BytesIO(self._record(row))
        if np.lib.format.read_magic(record) != (1, 0):
            raise ValueError("another version of the format")
        found = np.lib.format.read_array_header_1_0(record)
        size = record.tell() + prod(self.image_shape)
        if found != (self.image_shape, False, np.uint8) or size != len(record.getvalue()):
            raise ValueError(f"{found}, the manifest says {self.image_shape}")
        return np.frombuffer(record.getvalue(), np.uint8, record.tell())

    def _check_equal_sizes(self, size: int) -> None:
        odd = np.flatnonzero(self.index["size"] != size)
        if odd.size:
            found = self.index["size"][odd[0]]
            raise self.damaged(odd[0], f"the index gives it {found} bytes; as .npy of {self.image_shape} it has {size}")

    def _npy_images(self, rows: np.ndarray) -> np.ndarray:
        """Straight copies out of the map; the headers are compared, not parsed."""
        records = np.empty((len(rows), self.index["size"][0]), np.uint8)
        for record, offset in zip(records, self.index["offset"][rows].tolist(), strict=True):
            record[:] = self._bytes[offset : offset + len(record)]
        start = len(self._header)
        wrong = np.flatnonzero((records[:, :start] != self._header).any(axis=1))
        if wrong.size:
            raise self.damaged(rows[wrong[0]], "not the .npy that it should be (its header is damaged)")
        return records[:, start:].reshape(-1, *self.image_shape)

    def _png_image(self, row: int) -> np.ndarray:
        height, width, channels = self.image_shape
        try:
            with Image.open(io.BytesIO(self._record(row)), formats=["PNG"]) as image:
                if image.size != (width, height) or image.mode != PNG_MODES[channels]:
                    raise ValueError(f"{image.mode} {image.size}, the manifest says {self.image_shape}")
                return np.asarray(image).reshape(self.image_shape)
        except Exception as error:  # broken files make Pillow's decoder raise many kinds; each of them means damage
            raise self.damaged(row, f"not the PNG that it should be ({error})") from error

    def damaged(self, row: int, problem: str) -> UnreadableShard:
        """The error that names this shard, the sample in this row and its offset."""
        path, offset = self.root / self.entry["file"], self.index["offset"][row]
        key = "".join(filter(str.isprintable, self.index["key"][row].decode(errors="replace")))
        return UnreadableShard(f"{path}: sample '{key}' at offset {offset}: {problem}. {self.remedy}")
