"""MNIST, Fashion-MNIST or KMNIST from its four IDX files, gzipped or not; 28 x 28 pixels, 10 classes.

  python -m shard_data mnist --source ~/mnist --download --out data/mnist
  python -m shard_data fashion_mnist --source ~/fashion_mnist --out data/fashion_mnist

The three data sets have the same format and the same file names, so each needs a folder of its own.
Format: http://yann.lecun.com/exdb/mnist/, big-endian. Fashion-MNIST: Xiao, Rasul, Vollgraf, 2017. KMNIST: Clanuwat et
al., Deep Learning for Classical Japanese Literature, 2018."""

import argparse
import gzip
import struct
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from shard_data import downloads
from shard_data.downloads import FETCH_AGAIN
from shard_data.errors import DataError
from shard_data.file_kinds import HEAD, describe_kind
from shard_data.files import sha256
from shard_data.source import Record, Sample

IMAGES, LABELS = 2051, 2049
PREFIX = {"train": "train", "test": "t10k"}
SIDE = 28
NUM_CLASSES = 10
MAX_BYTES = 1 << 28  # of an unpacked file: five times MNIST's largest
CHUNK = 1 << 20


class Mnist:
    """60,000 training and 10,000 test digits as uint8 (28, 28, 1), labels 0 to 9, in the order of the files."""

    name: ClassVar[str] = "mnist"
    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")
    attributes: ClassVar[None] = None
    columns: ClassVar[frozenset[str]] = frozenset({"label"})
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    image_shape: ClassVar[tuple[int, int, int]] = (SIDE, SIDE, 1)

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_pairs": {}}  # a worker process reads the files itself

    def transform(self) -> dict[str, Any]:
        return {}

    def description(self) -> dict[str, Any]:
        paths = [path for split in self.splits for path in self._paths(split)]
        for split in self.splits:
            self._read(split)
        return {"files": {path.name: {"sha256": sha256(path)} for path in paths}}

    def records(self, split: str) -> Sequence[Record]:
        images, _ = self._read(split)
        return [Record(f"{split}-{i:05d}", (split, i)) for i in range(len(images))]

    def load(self, record: Record) -> Sample:
        split, i = record.where
        images, labels = self._read(split)
        return Sample(images[i], label=int(labels[i]))

    def _read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        if split not in self._pairs:
            self._pairs[split] = read_pair(*self._paths(split))
        return self._pairs[split]

    def _paths(self, split: str) -> tuple[Path, Path]:
        return find(self.folder, PREFIX[split], "images-idx3"), find(self.folder, PREFIX[split], "labels-idx1")


class FashionMnist(Mnist):
    """60,000 training and 10,000 test pieces of clothing."""

    name = "fashion_mnist"
    classes = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )


class Kmnist(Mnist):
    """60,000 training and 10,000 test characters of cursive Japanese; the classes are their modern readings."""

    name = "kmnist"
    classes = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def find(folder: Path, prefix: str, kind: str) -> Path:
    """The IDX file, with a dash or a dot before "idx", gzipped or not."""
    name = f"{prefix}-{kind}-ubyte"
    for candidate in (name + ".gz", name, name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise downloads.not_found(folder, f"{name}[.gz]")


def read_pair(image_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 28, 28, 1) and labels uint8 (N,). Raises DataError if the files are not a pair."""
    images = read_idx(image_path, IMAGES, ndim=3)
    labels = read_idx(label_path, LABELS, ndim=1)
    if images.shape[1:] != (SIDE, SIDE):
        height, width = images.shape[1:]
        raise DataError(f"{image_path}: images of {height} x {width} pixels instead of {SIDE} x {SIDE}; not MNIST")
    if not len(images):
        raise DataError(f"{image_path}: holds no images; {FETCH_AGAIN}")
    if len(images) != len(labels):
        raise DataError(
            f"{label_path}: {len(labels)} labels for the {len(images)} images of {image_path.name}; {FETCH_AGAIN}"
        )
    if labels.max() >= NUM_CLASSES:
        raise DataError(
            f"{label_path}: holds the label {labels.max()}; MNIST has 0 to {NUM_CLASSES - 1}: {FETCH_AGAIN}"
        )
    return images[..., None], labels


def read_idx(path: Path, magic: int, ndim: int) -> np.ndarray:
    """One IDX file of uint8. Raises DataError for another magic number, a truncated file or surplus bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return _read_idx(path, file, magic, ndim)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        with open(path, "rb") as file:
            kind = describe_kind(file.read(HEAD))
        raise DataError(f"{path}: truncated or damaged gzip file ({error}); it is {kind}; {FETCH_AGAIN}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {FETCH_AGAIN}") from None


def _read_idx(path: Path, file: BinaryIO, magic: int, ndim: int) -> np.ndarray:
    """Reads no more than the size in the header and one chunk, since little gzip data can unpack to much."""
    head, start = file.read(HEAD), 4 + 4 * ndim
    if len(head) < start or int.from_bytes(head[:4], "big") != magic:
        raise DataError(f"{path}: {describe_kind(head)}, not an IDX file of this kind ({magic:08x}); {FETCH_AGAIN}")
    shape = struct.unpack_from(f">{ndim}I", head, 4)
    size = prod(shape)
    if size > MAX_BYTES:
        raise DataError(f"{path}: its header says {size:,} bytes; at most {MAX_BYTES:,} are read; {FETCH_AGAIN}")
    data = bytearray(head[start:])
    while len(data) <= size and (chunk := file.read(CHUNK)):
        data += chunk
    if len(data) != size:
        state = f"truncated, {len(data):,} bytes instead of" if len(data) < size else "too long, more than"
        raise DataError(f"{path}: {state} the {size:,} bytes of its header; {FETCH_AGAIN}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    downloads.add_arguments(parser, "folder with the four IDX files, gzipped or not")


def from_arguments(arguments: argparse.Namespace) -> Mnist:
    kind = {"mnist": Mnist, "fashion_mnist": FashionMnist, "kmnist": Kmnist}[arguments.command]
    return kind(downloads.from_arguments(arguments.command, arguments))
