"""What the writer needs of a data set: a fixed list of records, and a function from a record to its sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np


class Record(NamedTuple):
    """One sample before it is loaded. `key` is unique in the set and has no dot; only the source interprets `where`."""

    key: str
    where: Any


@dataclass(frozen=True)
class Sample:
    """One loaded sample. `Source.columns` names the optional fields that a source sets."""

    image: np.ndarray
    """uint8 (H, W, C)."""
    label: int = -1
    """Class number; -1 is none."""
    attributes: Sequence[int] = ()
    """1 present, 0 absent, -1 unknown: (A,) in the order of the source's `attributes`."""
    hidden: Sequence[bool] = ()
    """(A,) true where the image cannot show whether the attribute is present."""
    identity: int = -1
    """Number of the person; -1 is none."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further content of KEY.json."""


class Omission(NamedTuple):
    """An original that is not converted, and why. `split` is "none" if it belongs to no split."""

    split: str
    name: str
    reason: str


class Source(Protocol):
    """A data set to convert. It is sent to worker processes, so its pickle is small: paths and options, no pixels.

    The order of `records` never changes, and `load` depends on the record only. So the shards do not depend on the
    number of workers or on their timing.

    A source whose originals can be incomplete also has `omissions`: a sequence of Omission, set by `description`, with
    the originals that `records` skips. `load` raises BadImage for an original that is unreadable.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...] | None]
    attributes: ClassVar[tuple[str, ...] | None]
    columns: ClassVar[frozenset[str]]
    """Which of label, attributes, hidden and identity the samples have."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in writing order."""

    def transform(self) -> dict[str, Any]:
        """How the originals were processed, for the manifest and its fingerprint."""

    def description(self) -> dict[str, Any]:
        """Where the originals come from, for the manifest. Raises DataError if they cannot be used."""

    def records(self, split: str) -> Sequence[Record]:
        """The samples of a split in their fixed order."""

    def load(self, record: Record) -> Sample:
        """The sample of a record."""
