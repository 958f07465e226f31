"""Random access to the samples of a shard set: bytes at known offsets of its tars.

The format is that of docs/architecture.md. Opening reads the manifest alone; a shard's index and tar are opened when
one of its samples is first read.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.data.lru_cache import LRUCache
from pipeline.data.read_files import MissingFile, OpenFile, retried
from pipeline.data.shard_index import load_index, printable
from pipeline.data.tar_images import TarImages, UnreadableSample, image_shape
from shard_data import manifest as manifests

MAX_OPEN_SHARDS = 256
"""One file each; a process may commonly hold 1,024."""

MAX_IMAGE_BYTES = 2**28
"""The largest image that is read: 9,459 x 9,459 RGB."""

Indices = Sequence[int] | np.ndarray
Result = TypeVar("Result")


class UnreadableShard(ValueError):
    """A shard that is not what its manifest says. The message names the shard, the sample and the offset in the tar."""


class TarShards:
    """One split of a shard set. Samples are numbered through its shards in the manifest's order, from 0.

    Safe to hand to worker processes, forked or spawned. Every method that takes indices (n,) raises IndexError outside
    0..len-1, UnreadableShard where the files are not what the manifest says, and OSError for a fault of the system that
    stays for some seconds (see `read_files`).
    """

    def __init__(self, root: str | Path, split: str, verify: bool = False, origin: str | None = None):
        """`verify`: compare the sha256 of each tar with the manifest's when it is first opened, 0.5 to 2 GB/s; else
        changed pixels of a .npy are not noticed. `origin`: the address from which `root` was fetched, for messages.

        Raises ValueError when `root` is no complete shard set or has no such split.
        """
        self.root = Path(root)
        self.split = split
        self.verify = verify
        self.fix = (
            f"Delete {self.root}; it is fetched again from {origin}"
            if origin
            else f"Copy or make the shard set again; `python -m shard_data verify {self.root}` lists all that is wrong"
        )
        self.manifest = manifests.load(self.root)
        if split not in self.manifest["splits"]:
            raise ValueError(f"{self.root}: no split '{split}'; it has: {', '.join(self.manifest['splits'])}")
        if prod(self.image_shape) > MAX_IMAGE_BYTES:
            raise ValueError(f"{self.root}: images of {self.image_shape}; at most {MAX_IMAGE_BYTES} bytes are read")
        self._entries = self.manifest["splits"][split]["shards"]
        self.shard_sizes = tuple(shard["count"] for shard in self._entries)
        self._starts = np.cumsum((0, *self.shard_sizes))  # (S + 1,)
        self._members: np.ndarray | None = None  # of a subset: their indices in the whole split
        self._indexes = LRUCache(MAX_OPEN_SHARDS)
        self._tars = LRUCache(MAX_OPEN_SHARDS)
        self._verified: dict[int, bool] = {}  # of the tars that were hashed: whether the hash is the manifest's

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._members is None else len(self._members)

    def subset(self, members: np.ndarray, name: str | None = None) -> "TarShards":
        """The samples at these indices, ascending (n,) int64, numbered from 0, as a split called `name`."""
        part, members = copy(self), self._checked(members)
        part.split = name or self.split
        part._members = members if self._members is None else self._members[members]
        part.shard_sizes = tuple(size for size in np.bincount(self._shard_of(part._members)).tolist() if size)
        return part

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return image_shape(self.manifest)

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
            self._read_images(number, rows, out, here)
        return out

    def _read_images(self, number: int, rows: np.ndarray, out: np.ndarray, here: np.ndarray) -> None:
        path, index = self.root / self._entries[number]["file"], self._index(number)
        try:
            self._retried(path, lambda: self._tar(number, int(rows[0])).read_into(out, here, rows))
        except UnreadableSample as error:
            key, offset = printable(index["key"][error.row]), index["offset"][error.row]
            place = f"{path}: sample '{key}' at offset {offset}"
            raise UnreadableShard(f"{place}: {error.problem}. {self.fix}") from error

    def keys(self, indices: Indices) -> list[str]:
        """The samples' names, unique within the set."""
        out = [""] * len(indices)
        for number, here, rows in self._by_shard(indices):
            for place, key in zip(here.tolist(), self._index(number)["key"][rows].tolist(), strict=True):
                out[place] = printable(key)
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
        indices = self._checked(indices)
        indices = indices if self._members is None else self._members[indices]
        numbers = self._shard_of(indices)
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            yield number, here, indices[here] - self._starts[number]

    def _shard_of(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of the shards (n,) of samples of the whole split."""
        return np.searchsorted(self._starts, indices, side="right") - 1

    def _checked(self, indices: Indices) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(
                f"indices {indices.min()}..{indices.max()} are outside split '{self.split}' with {len(self)} samples"
            )
        return indices

    def _index(self, number: int) -> np.ndarray:
        return self._indexes.get(number, lambda: self._open_index(number))

    def _open_index(self, number: int) -> np.ndarray:
        entry = self._entries[number]
        path = self.root / entry["index"]
        try:
            return self._retried(path, lambda: load_index(OpenFile(path), entry, self.manifest))
        except ValueError as error:
            lost = f"so the {entry['count']} samples of {entry['file']} cannot be found"
            raise UnreadableShard(f"{path}: {error}, {lost}. {self.fix}") from error

    def _tar(self, number: int, wanted: int) -> TarImages:
        return self._tars.get(number, lambda: self._open_tar(number, wanted))

    def _open_tar(self, number: int, wanted: int) -> TarImages:
        """Raises UnreadableSample with the row `wanted` where no sample of the tar can be read."""
        entry = self._entries[number]
        try:
            file = OpenFile(self.root / entry["file"])
        except MissingFile as error:
            raise UnreadableSample(wanted, str(error)) from error
        tar = TarImages(file, entry, self._index(number), self.manifest, wanted)
        if self.verify:
            if number not in self._verified:  # remembered, as a wrong shard may be read again and again
                self._verified[number] = tar.has_hash()
            if not self._verified[number]:
                raise UnreadableSample(wanted, "some bytes of the shard were changed: its sha256 is not the manifest's")
        return tar

    def _retried(self, path: Path, read: Callable[[], Result]) -> Result:
        # Without its open tars this process may have the file descriptors and the memory that it lacked, and a file
        # that a server has replaced (ESTALE) is opened again.
        return retried(path, read, before_retry=self._tars.clear)
