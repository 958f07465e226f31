"""ImageNet at 32 x 32 or 64 x 64 pixels and 1000 classes, from the eleven .npz files in which its authors publish it.

  python -m shard_data imagenet32 --source ~/imagenet32 --out data/imagenet32
  python -m shard_data imagenet64 --source ~/imagenet64 --out data/imagenet64

Chrabaszcz, Loshchilov, Hutter: A Downsampled Variant of ImageNet as an Alternative to the CIFAR datasets, 2017;
https://image-net.org/download-images.php (log in): unzip Imagenet32_train_npz.zip and Imagenet32_val_npz.zip, or
Imagenet64_train_part1_npz.zip, Imagenet64_train_part2_npz.zip and Imagenet64_val_npz.zip, into --source. The files hold
`data` (uint8, rows of 3072 or 12288: all red, then green, then blue) and `labels` (1 to 1000); pickles in them are
refused. Training images are already in random order.

These are not the images of van den Oord et al., 2016 (image-net.org/small, withdrawn), which were reduced in another
way and which most papers report on: bits per dimension on the two cannot be compared. `folder` reads those."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from shard_data.errors import DataError
from shard_data.files import sha256
from shard_data.source import Omission, Record, Sample
from shard_data.sources.npz_file import NpzFile

NUM_CLASSES = 1000
BATCHES = {"train": tuple(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val": ("val_data.npz",)}
ARRAYS = ("data", "labels")
MAX_IMAGES = 1 << 17  # of a compressed file; the largest one has 128,123
FIX = "unzip it again from the published archive"


class Batch(NamedTuple):
    """One file's arrays, checked."""

    images: np.ndarray
    """uint8 (N, 3 * size * size)."""
    labels: np.ndarray
    """int64 (N,), from 0."""

    @property
    def in_memory(self) -> bool:
        return not isinstance(self.images, np.memmap)


class DownsampledImageNet:
    """1,281,167 training and 50,000 validation images as uint8 (size, size, 3), in the order of the files.

    A class is named by its published label, "1" to "1000". A process holds at most one compressed batch in memory.
    """

    name: ClassVar[str]
    size: ClassVar[int]
    archives: ClassVar[tuple[str, ...]]
    """The published zip files, without `.zip`: also the names of the folders that they may be unpacked to."""
    image_shape: ClassVar[tuple[int, int, int]]
    classes: ClassVar[tuple[str, ...]] = tuple(str(label) for label in range(1, NUM_CLASSES + 1))
    attributes: ClassVar[None] = None
    columns: ClassVar[frozenset[str]] = frozenset({"label"})
    splits: ClassVar[tuple[str, ...]] = tuple(BATCHES)

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        names = [name for split in self.splits for name in BATCHES[split]]
        places = [(name, self.folder / place / name) for name in names for place in (*self.archives, ".")]
        self.paths = {name: path for name, path in places if path.is_file()}
        if not self.paths:
            problem = f"does not hold {names[0]}" if self.folder.is_dir() else "no such folder"
            raise DataError(
                f"{self.folder}: {problem}; --source must be the folder with the files of the published "
                f"{', '.join(f'{archive}.zip' for archive in self.archives)}"
            )
        self.omissions: list[Omission] = []
        self.counts: dict[str, int] = {}
        self._open: dict[str, Batch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": {}}  # a worker process opens the files itself

    def transform(self) -> dict[str, Any]:
        return {}

    def description(self) -> dict[str, Any]:
        """Reads all files once to check them."""
        wanted = [(split, name) for split in self.splits for name in BATCHES[split]]
        self.omissions[:] = [Omission(split, name, "no such file") for split, name in wanted if name not in self.paths]
        for name in self.paths:
            self._file(name).check_sums()
            self.counts[name] = len(self._batch(name).labels)
        self._open.clear()
        return {"files": {name: {"sha256": sha256(path)} for name, path in self.paths.items()}}

    def records(self, split: str) -> Sequence[Record]:
        places = [(name, i) for name in BATCHES[split] for i in range(self.counts.get(name, 0))]
        return [Record(f"{split}-{number:07d}", place) for number, place in enumerate(places)]

    def load(self, record: Record) -> Sample:
        name, i = record.where
        batch = self._batch(name)
        image = batch.images[i].reshape(3, self.size, self.size).transpose(1, 2, 0)
        return Sample(np.ascontiguousarray(image), label=int(batch.labels[i]))

    def check_random_access(self) -> None:
        """Raises DataError if images can only be read in the order of the files, since a file is compressed."""
        for name, path in self.paths.items():
            if self._file(name).is_compressed():
                raise DataError(
                    f"{path}: is compressed, so its images are read in order; omit --shuffle (the published order is "
                    "random), or write the file again with numpy.savez"
                )

    def _batch(self, name: str) -> Batch:
        if name not in self._open:
            self._open = {other: kept for other, kept in self._open.items() if not kept.in_memory}
            self._open[name] = self._checked(name)
        return self._open[name]

    def _file(self, name: str) -> NpzFile:
        return NpzFile(self.paths[name], ARRAYS, MAX_IMAGES * 3 * self.size**2, FIX)

    def _checked(self, name: str) -> Batch:
        arrays, path = self._file(name).arrays(), self.paths[name]
        for array in ARRAYS:
            if array not in arrays:
                raise DataError(f"{path}: holds no array {array!r}; {FIX}")
        images, labels, columns = arrays["data"], arrays["labels"], 3 * self.size**2
        if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != columns:
            raise DataError(f"{path}: data is {images.dtype} {images.shape} instead of uint8 (N, {columns}); {FIX}")
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            raise DataError(
                f"{path}: labels are {labels.dtype} {labels.shape} instead of integers ({len(images)},); {FIX}"
            )
        if int(labels.min()) < 1 or int(labels.max()) > NUM_CLASSES:
            raise DataError(f"{path}: labels run from {labels.min()} to {labels.max()} instead of 1 to 1000; {FIX}")
        return Batch(images, labels.astype(np.int64) - 1)


class ImageNet32(DownsampledImageNet):
    """32 x 32 pixels."""

    name, size, image_shape = "imagenet32", 32, (32, 32, 3)
    archives = ("Imagenet32_train_npz", "Imagenet32_val_npz")


class ImageNet64(DownsampledImageNet):
    """64 x 64 pixels."""

    name, size, image_shape = "imagenet64", 64, (64, 64, 3)
    archives = ("Imagenet64_train_part1_npz", "Imagenet64_train_part2_npz", "Imagenet64_val_npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = "folder with train_data_batch_1.npz to train_data_batch_10.npz and val_data.npz"
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help=source)


def from_arguments(arguments: argparse.Namespace) -> DownsampledImageNet:
    source = {"imagenet32": ImageNet32, "imagenet64": ImageNet64}[arguments.command](arguments.source)
    if arguments.shuffle is not None:
        source.check_random_access()
    return source
