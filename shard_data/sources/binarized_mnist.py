"""MNIST with fixed binary pixels, as Larochelle and Murray (2011) published it; 28 x 28 pixels, without labels.

  python -m shard_data binarized_mnist --source ~/binarized_mnist --out data/binarized_mnist

It has 50,000 images to train, 10,000 to validate and 10,000 to test, whose pixels are 0 or 255.

The folder holds binarized_mnist_train, binarized_mnist_valid and binarized_mnist_test, each as published (.amat: a line
of 784 zeros and ones for each image; http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/) or as a
MATLAB file (.mat of version 5 to 7: one matrix of images x 784 or 784 x images). The 784 values are the rows of the
image, one after the other.

Larochelle and Murray, The Neural Autoregressive Distribution Estimator, AISTATS 2011."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shard_data.errors import DataError
from shard_data.file_kinds import HEAD, describe_kind
from shard_data.files import sha256
from shard_data.mat_file import read_binary_matrix
from shard_data.source import Record, Sample

SIDE = 28
PIXELS = SIDE * SIDE
FILES = {"train": "binarized_mnist_train", "val": "binarized_mnist_valid", "test": "binarized_mnist_test"}
ENDINGS = (".amat", ".mat")
MAX_LINE = 2**14
FIX = "replace it with an intact copy of the published file"


class BinarizedMnist:
    """The published binary images as uint8 (28, 28, 1), 0 or 255, in the order of the files."""

    name: ClassVar[str] = "binarized_mnist"
    classes: ClassVar[None] = None
    attributes: ClassVar[None] = None
    columns: ClassVar[frozenset[str]] = frozenset()
    splits: ClassVar[tuple[str, ...]] = tuple(FILES)
    image_shape: ClassVar[tuple[int, int, int]] = (SIDE, SIDE, 1)
    counts: ClassVar[dict[str, int]] = {"train": 50_000, "val": 10_000, "test": 10_000}

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._images: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_images": {}}  # a worker process reads the files itself

    def transform(self) -> dict[str, Any]:
        """`binarization` marks a set whose pixels are 0 or 255; the pipeline does not binarize it again."""
        return {"binarization": "fixed", "reference": "Larochelle and Murray 2011"}

    def description(self) -> dict[str, Any]:
        paths = [find(self.folder, split) for split in self.splits]
        for split in self.splits:
            self._read(split)
        return {"files": {path.name: {"sha256": sha256(path)} for path in paths}}

    def records(self, split: str) -> Sequence[Record]:
        return [Record(f"{split}-{i:05d}", (split, i)) for i in range(self.counts[split])]

    def load(self, record: Record) -> Sample:
        split, i = record.where
        return Sample(self._read(split)[i].reshape(SIDE, SIDE, 1) * np.uint8(255))

    def _read(self, split: str) -> np.ndarray:
        if split not in self._images:
            path, count = find(self.folder, split), self.counts[split]
            read = read_amat if path.suffix == ".amat" else read_mat
            self._images[split] = read(path, count)
        return self._images[split]


def find(folder: Path, split: str) -> Path:
    """The file of a split. Raises DataError where there is none."""
    for ending in ENDINGS:
        path = folder / (FILES[split] + ending)
        if path.is_file():
            return path
    problem = f"does not hold {FILES[split]}.amat or .mat" if folder.is_dir() else "no such folder"
    raise DataError(f"{folder}: {problem}; check --source (python -m shard_data binarized_mnist --help says where)")


def read_mat(path: Path, count: int) -> np.ndarray:
    """(count, 784) uint8 of zeros and ones."""
    return np.ascontiguousarray(read_binary_matrix(path, count, PIXELS))


def read_amat(path: Path, count: int) -> np.ndarray:
    """(count, 784) uint8 of zeros and ones. Raises DataError, with the line, for anything but `count` such lines."""
    images, found = np.empty((count, PIXELS), np.uint8), 0
    try:
        for number, line in _lines(path):
            if found == count:
                raise DataError(f"{path}: line {number}: more than the {count:,} images of this split; {FIX}")
            images[found] = _parse(path, number, line)
            found += 1
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {FIX}") from None
    if found < count:
        raise DataError(f"{path}: truncated, {found:,} images instead of {count:,}; {FIX}")
    return images


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers, none longer than MAX_LINE."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if stripped := line.strip():
                yield number, stripped


def _parse(path: Path, number: int, line: bytes) -> np.ndarray:
    """(784,) uint8."""
    characters = np.frombuffer(line, np.uint8)
    if len(line) != 2 * PIXELS - 1 or (characters[1::2] != ord(" ")).any():  # other white space between the values
        words = line.split()
        if not set(words) <= {b"0", b"1"} or len(words) != PIXELS:
            raise DataError(f"{path}: line {number}: {_problem(line, words)}; {FIX}")
        characters = np.frombuffer(b" ".join(words), np.uint8)
    values = characters[::2] - np.uint8(ord("0"))
    if values.max() > 1:
        raise DataError(f"{path}: line {number}: {_problem(line, line.split())}; {FIX}")
    return values


def _problem(line: bytes, words: list[bytes]) -> str:
    wrong = next((word for word in words if word not in (b"0", b"1")), None)
    if wrong is None:
        return f"{len(words)} values instead of {PIXELS}"
    try:
        float(wrong)
    except ValueError:
        return f"{describe_kind(line[:HEAD])}, not {PIXELS} zeros and ones"
    return f"holds the value {wrong[:20].decode('ascii', 'replace')}, where all are 0 or 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder with the three files")


def from_arguments(arguments: argparse.Namespace) -> BinarizedMnist:
    return BinarizedMnist(arguments.source)
