"""CIFAR-10 or CIFAR-100 from their "python version": the .tar.gz, or the folder unpacked from it.

  python -m shard_data cifar10 --source ~/cifar --download --out data/cifar10
  python -m shard_data cifar100 --source ~/cifar-100-python --out data/cifar100

Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009; https://www.cs.toronto.edu/~kriz/cifar.html.
The archive is read without unpacking it. The batches are pickles; they are read by an interpreter that cannot call
anything, so a manipulated file cannot run code."""

import argparse
import mmap
import tarfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shard_data import downloads
from shard_data.errors import DataError
from shard_data.file_kinds import HEAD, describe_kind
from shard_data.files import sha256
from shard_data.plain_pickle import loads
from shard_data.source import Omission, Record, Sample

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
MAX_BYTES = 1 << 28  # of a batch; CIFAR-100's largest has 155 MB


class Cifar:
    """Images as uint8 (32, 32, 3) with class labels, in the order of the batches; subclasses name the files."""

    name: ClassVar[str]
    batches: ClassVar[dict[str, tuple[str, ...]]]
    meta: ClassVar[str]
    label_key: ClassVar[bytes]
    names_key: ClassVar[bytes]
    folder_name: ClassVar[str]
    archive_name: ClassVar[str]
    num_classes: ClassVar[int]
    attributes: ClassVar[None] = None
    columns: ClassVar[frozenset[str]] = frozenset({"label"})
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    image_shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)

    def __init__(self, folder: str | Path):
        names = (*self.batches["train"], *self.batches["test"], self.meta)
        self.files = BatchFiles(Path(folder), self.folder_name, self.archive_name, names)
        self.omissions: list[Omission] = []
        self.counts: dict[str, int] = {}
        self._batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_batches": {}}  # a worker process reads the files itself

    @cached_property
    def classes(self) -> tuple[str, ...]:
        found = self._loads(self.meta).get(self.names_key)
        names = [name.decode() if isinstance(name, bytes) else name for name in found or ()]
        if len(set(names)) != self.num_classes or not all(isinstance(name, str) for name in names):
            raise self._damaged(self.meta, f"does not name {self.num_classes} classes")
        return tuple(names)

    def transform(self) -> dict[str, Any]:
        return {}

    def description(self) -> dict[str, Any]:
        """Reads all batches to check them, and releases them, so that only workers hold pixels."""
        wanted = [(split, batch) for split in self.splits for batch in self.batches[split]]
        self.omissions[:] = [
            Omission(s, batch, "no such file") for s, batch in wanted if batch not in self.files.present
        ]
        self.classes  # noqa: B018
        self.counts = {batch: len(self._batch(batch)[1]) for _, batch in wanted if batch in self.files.present}
        self._batches.clear()
        self.files.forget()
        return self.files.description()

    def records(self, split: str) -> Sequence[Record]:
        places = [(batch, i) for batch in self.batches[split] for i in range(self.counts.get(batch, 0))]
        return [Record(f"{split}-{number:05d}", place) for number, place in enumerate(places)]

    def load(self, record: Record) -> Sample:
        batch, i = record.where
        images, labels = self._batch(batch)
        return Sample(np.ascontiguousarray(images[i]), label=int(labels[i]))

    def _batch(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (N, 32, 32, 3) and labels (N,) of one batch file."""
        if name not in self._batches:
            self._batches[name] = self._checked(name, self._loads(name))
        return self._batches[name]

    def _loads(self, name: str) -> dict[bytes, Any]:
        data = self.files.read(name)
        try:
            content = loads(data)
        except ValueError as error:
            raise self._damaged(name, f"cannot be read ({error}); it is {describe_kind(data[:HEAD])}") from None
        if not isinstance(content, dict):
            raise self._damaged(name, "holds no dictionary")
        return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}

    def _checked(self, name: str, content: dict[bytes, Any]) -> tuple[np.ndarray, np.ndarray]:
        data, found = content.get(b"data"), content.get(self.label_key)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != PIXELS or not len(data):
            raise self._damaged(name, f"holds no images as rows of {PIXELS} bytes")
        if not isinstance(found, list) or not all(type(k) is int and 0 <= k < self.num_classes for k in found):
            raise self._damaged(name, f"holds no labels from 0 to {self.num_classes - 1}")
        if len(found) != len(data):
            raise self._damaged(name, f"holds {len(found)} labels for {len(data)} images")
        return data.reshape(-1, *SHAPE).transpose(0, 2, 3, 1), np.array(found, np.uint8)

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(f"{self.files.place(name)}: {what}; {downloads.FETCH_AGAIN}")


class Cifar10(Cifar):
    """50,000 training and 10,000 test images of 10 classes."""

    name = "cifar10"
    batches = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}  # noqa: RUF012
    meta, label_key, names_key = "batches.meta", b"labels", b"label_names"
    folder_name, archive_name, num_classes = "cifar-10-batches-py", "cifar-10-python.tar.gz", 10


class Cifar100(Cifar):
    """50,000 training and 10,000 test images of 100 classes (the fine labels)."""

    name = "cifar100"
    batches = {"train": ("train",), "test": ("test",)}  # noqa: RUF012
    meta, label_key, names_key = "meta", b"fine_labels", b"fine_label_names"
    folder_name, archive_name, num_classes = "cifar-100-python", "cifar-100-python.tar.gz", 100


class BatchFiles:
    """The files of CIFAR-10 or CIFAR-100, from the folder if it exists, otherwise from the archive."""

    def __init__(self, folder: Path, folder_name: str, archive_name: str, names: Sequence[str]):
        self.folder_name, self.names = folder_name, names
        here = next((path for path in (folder, folder / folder_name) if (path / names[-1]).is_file()), None)
        packed = (folder / archive_name, folder / archive_name.removesuffix(".gz"), folder)
        self.folder, self.archive = here, None if here else next((path for path in packed if path.is_file()), None)
        if not self.folder and not self.archive:
            raise downloads.not_found(folder, f"{folder_name}/{names[-1]} or {archive_name}")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_members"}

    @property
    def present(self) -> set[str]:
        """The names of the files that exist."""
        return {name for name in self.names if (self.folder / name).is_file()} if self.folder else set(self._members)

    def place(self, name: str) -> str:
        return str(self.folder / name) if self.folder else f"{self.archive}: {self.folder_name}/{name}"

    def description(self) -> dict[str, Any]:
        paths = [self.folder / name for name in self.names] if self.folder else [self.archive]
        return {"files": {path.name: {"sha256": sha256(path)} for path in paths if path.is_file()}}

    def read(self, name: str) -> bytes | mmap.mmap:
        """The bytes of a file. Files of a folder are memory-mapped, so that all processes share them."""
        if not self.folder:
            if name not in self._members:
                raise DataError(f"{self.place(name)}: not in the archive; {downloads.FETCH_AGAIN}")
            return self._members[name]
        try:
            with open(self.folder / name, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            return b""  # an empty file cannot be mapped
        except OSError as error:
            raise DataError(f"{self.place(name)}: cannot be read ({error.strerror}); {downloads.FETCH_AGAIN}") from None

    def forget(self) -> None:
        """Release what was read from the archive; it is read again when needed."""
        self.__dict__.pop("_members", None)

    @cached_property
    def _members(self) -> dict[str, bytes]:
        """The archive's files, in memory. Its other members are ignored, and nothing is written."""
        wanted, members = {f"{self.folder_name}/{name}": name for name in self.names}, {}
        try:
            with tarfile.open(self.archive) as tar:
                for member in tar:
                    name = wanted.get(member.name.removeprefix("./"))
                    if name and member.isreg() and member.size <= MAX_BYTES:
                        members[name] = tar.extractfile(member).read()
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            with open(self.archive, "rb") as file:
                what = describe_kind(file.read(HEAD))
            reason = f"truncated or damaged ({error}); it is {what}"
            raise DataError(f"{self.archive}: {reason}; {downloads.FETCH_AGAIN}") from None
        return members


def add_arguments(parser: argparse.ArgumentParser) -> None:
    downloads.add_arguments(parser, "folder with the .tar.gz of the python version, or the folder unpacked from it")


def from_arguments(arguments: argparse.Namespace) -> Cifar:
    kind = {"cifar10": Cifar10, "cifar100": Cifar100}[arguments.command]
    return kind(downloads.from_arguments(arguments.command, arguments))
