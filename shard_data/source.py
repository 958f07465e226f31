"""What a data set offers to the writer: a fixed list of records, and a pure function from a record to its sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np


class Record(NamedTuple):
    """One sample before it is loaded. `key` is unique in the set and holds no dot; `where` is the source's business."""

    key: str
    where: Any


@dataclass(frozen=True)
class Sample:
    """One loaded sample; which of the optional parts a source fills in, its `columns` say."""

    image: np.ndarray
    """uint8 (H, W, C)."""
    label: int = -1
    """Class number; -1 is none."""
    attributes: Sequence[int] = ()
    """1 present, 0 absent, -1 unknown: (A,) in the order of the source's `attributes`."""
    hidden: Sequence[bool] = ()
    """(A,) true where the picture cannot show whether the attribute is there."""
    identity: int = -1
    """Number of the person; -1 is none."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else goes into KEY.json."""


class Omission(NamedTuple):
    """An original that cannot be converted, and why."""

    split: str
    name: str
    reason: str


class Source(Protocol):
    """A data set to convert. It is sent to worker processes, so it pickles cheaply: paths and options, no pixels.

    `records` lists a split in an order that never changes; `load` depends on the record alone. So neither the number
    of workers nor the order in which they work can show in the shards.

    A source whose originals can be incomplete also has `omissions`: a sequence of Omission, known after `description`,
    of what its records leave out. An original that turns out unreadable makes `load` raise BadImage.
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
        """What was done to the originals, for the manifest and its fingerprint."""

    def description(self) -> dict[str, Any]:
        """Where the originals come from, for the manifest. Checks them: raises DataError where they cannot be used."""

    def records(self, split: str) -> Sequence[Record]:
        """The samples of a split in their fixed order."""

    def load(self, record: Record) -> Sample:
        """The sample of a record."""
