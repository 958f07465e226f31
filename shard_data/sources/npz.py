"""Your own arrays from one .npz file, as numpy.savez writes it: images, and optionally labels or attributes.

  numpy.savez("digits.npz", images=images, labels=labels)
  python -m shard_data npz --source digits.npz --val 0.1 --test 0.1 --out data/digits

    images           uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W)
    labels           integers (N,): class numbers, -1 for none                              optional
    classes          strings (K,): names of the classes (default: their numbers)            optional
    attributes       integers or booleans (N, A): 1 present, 0 absent, -1 unknown           optional
    attribute_names  strings (A,) (default: attribute_00, ...)                              optional
    settings         anything; not read                                                     optional

Images are not resized. Uncompressed arrays are memory-mapped, so they may be larger than the memory."""

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from shard_data.errors import DataError
from shard_data.files import sha256
from shard_data.source import Record, Sample
from shard_data.sources import hash_split
from shard_data.sources.hash_split import SPLITS, HashSplit
from shard_data.sources.npz_file import NpzFile

ARRAYS = ("images", "labels", "classes", "attributes", "attribute_names")
NOT_READ = ("settings",)
MAX_UNPACKED = 1 << 28  # bytes of a compressed array, which every worker holds in memory
MAX_SIDE = 1024
MAX_NAMES = 10_000


class Arrays(NamedTuple):
    """The arrays of one file, checked."""

    images: np.ndarray
    """uint8 (N, H, W, C)."""
    labels: np.ndarray | None
    """int64 (N,)."""
    classes: tuple[str, ...] | None
    attributes: np.ndarray | None
    """int8 (N, A)."""
    attribute_names: tuple[str, ...] | None


class Npz:
    """The images of a .npz file as they are. `val` and `test`: shares, or numbers of images, of a split by hash."""

    splits: ClassVar[tuple[str, ...]] = SPLITS

    def __init__(
        self, path: str | Path, *, val: float = 0.05, test: float = 0.05, split_seed: int = 0, name: str = "npz"
    ):
        self.path, self.hash_split, self.name = Path(path), HashSplit(val, test, split_seed), name
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; --source must be a .npz file")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # a worker process opens the file itself

    @cached_property
    def arrays(self) -> Arrays:
        return read_arrays(self.path)

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.arrays.classes

    @property
    def attributes(self) -> tuple[str, ...] | None:
        return self.arrays.attribute_names

    @property
    def columns(self) -> frozenset[str]:
        given = {"label": self.arrays.labels, "attributes": self.arrays.attributes}
        return frozenset(name for name, array in given.items() if array is not None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.arrays.images.shape[1:]

    def transform(self) -> dict[str, Any]:
        return {}

    def description(self) -> dict[str, Any]:
        open_file(self.path).check_sums()
        splits = self.hash_split.description()
        return {"sha256": sha256(self.path), "images": len(self.arrays.images), "splits": splits}

    @cached_property
    def _splits(self) -> list[str]:
        return self.hash_split.assign([str(i) for i in range(len(self.arrays.images))], str(self.path))

    def records(self, split: str) -> Sequence[Record]:
        return [Record(f"{split}-{i:07d}", i) for i, of in enumerate(self._splits) if of == split]

    def load(self, record: Record) -> Sample:
        i, arrays = record.where, self.arrays
        return Sample(
            np.ascontiguousarray(arrays.images[i]),
            label=-1 if arrays.labels is None else int(arrays.labels[i]),
            attributes=() if arrays.attributes is None else arrays.attributes[i].tolist(),
            facts={"index": i},
        )


def open_file(path: Path) -> NpzFile:
    return NpzFile(path, ARRAYS, MAX_UNPACKED, "write it with numpy.savez", NOT_READ)


def read_arrays(path: Path) -> Arrays:
    """The arrays of the file. Raises DataError with the file and the array for anything but the module's format."""
    found = open_file(path).arrays()
    if "images" not in found:
        raise DataError(f"{path}: holds no array 'images'; it has: {', '.join(sorted(found)) or 'nothing'}")
    images = _check_images(path, found["images"])
    labels = _check_labels(path, found.get("labels"), len(images))
    classes = _check_names(path, "classes", found.get("classes"))
    attributes = _check_attributes(path, found.get("attributes"), len(images))
    names = _check_names(path, "attribute_names", found.get("attribute_names"))
    return Arrays(images, labels, _fit_classes(path, labels, classes), attributes, _fit_names(path, attributes, names))


def _check_images(path: Path, images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8:
        raise DataError(f"{path}: images are {images.dtype}; give uint8, 0 to 255")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3) or max(images.shape[1:3]) > MAX_SIDE:
        raise DataError(
            f"{path}: images have shape {images.shape}; give (N, H, W, C) with 1 or 3 channels C, last, "
            f"and sides up to {MAX_SIDE}"
        )
    return images


def _check_labels(path: Path, labels: np.ndarray | None, count: int) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}; give whole numbers ({count},)")
    if int(labels.min()) < -1 or int(labels.max()) >= MAX_NAMES:
        raise DataError(
            f"{path}: labels run from {labels.min()} to {labels.max()}; give class numbers from 0 up to "
            f"{MAX_NAMES - 1}, -1 for none"
        )
    return labels.astype(np.int64)


def _check_attributes(path: Path, attributes: np.ndarray | None, count: int) -> np.ndarray | None:
    if attributes is None:
        return None
    if attributes.ndim != 2 or len(attributes) != count or attributes.dtype.kind not in "iub":
        raise DataError(
            f"{path}: attributes are {attributes.dtype} {attributes.shape}; give whole numbers ({count}, A)"
        )
    if int(attributes.min()) < -1 or int(attributes.max()) > 1:
        raise DataError(
            f"{path}: attributes run from {attributes.min()} to {attributes.max()}; "
            "give 1 for present, 0 for absent, -1 for unknown"
        )
    return attributes.astype(np.int8)


def _check_names(path: Path, what: str, names: np.ndarray | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) > MAX_NAMES:
        raise DataError(f"{path}: {what} are {names.dtype} {names.shape}; give strings (K,)")
    texts = tuple(names.tolist())
    counts = Counter(texts)
    for text in texts:
        if not text.strip() or not text.isprintable() or counts[text] > 1:
            raise DataError(f"{path}: {what} hold {text!r}; give each name once, printable and not empty")
    return texts


def _fit_classes(path: Path, labels: np.ndarray | None, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if labels is None:
        if classes is not None:
            raise DataError(f"{path}: holds classes and no labels; add labels, or remove classes")
        return None
    highest = int(labels.max())
    if classes is None:
        return tuple(map(str, range(highest + 1))) or None
    if highest >= len(classes):
        raise DataError(f"{path}: holds the label {highest} and only {len(classes)} classes; give a name for each")
    return classes


def _fit_names(path: Path, attributes: np.ndarray | None, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if attributes is None:
        if names is not None:
            raise DataError(
                f"{path}: holds attribute_names and no attributes; add attributes, or remove attribute_names"
            )
        return None
    columns = attributes.shape[1]
    if names is None:
        return tuple(f"attribute_{i:02d}" for i in range(columns))
    if len(names) != columns:
        raise DataError(f"{path}: {len(names)} attribute_names for {columns} columns of attributes; give one for each")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, metavar="FILE.npz", help="file with the arrays")
    hash_split.add_arguments(parser)
    parser.add_argument("--name", default="npz", help="name of the set in its manifest (default %(default)s)")
    parser.set_defaults(shuffle=0)  # images are often sorted by class


def from_arguments(arguments: argparse.Namespace) -> Npz:
    return Npz(
        arguments.source, val=arguments.val, test=arguments.test, split_seed=arguments.split_seed, name=arguments.name
    )
