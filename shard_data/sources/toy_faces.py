"""Synthetic faces with 18 attributes, rendered from independent factors of variation; nothing to download.

  python -m shard_data toy_faces --out data/toy_faces32
  python -m shard_data toy_faces --out data/toy_faces64 --size 64 --train 50000 --seed 1

A face is determined by the seed and its number, so a larger set contains the smaller one. docs/data.md describes the
factors and attributes."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from shard_data.errors import DataError
from shard_data.geometry import check_size
from shard_data.source import Record, Sample
from shard_data.sources.face_drawing import draw_face
from shard_data.sources.face_factors import ATTRIBUTES, attributes, hidden, sample_factors

FIRST_INDEX = {"train": 0, "val": 10_000_000, "test": 20_000_000}  # so that no face is in two splits
LARGEST_SPLIT = 10_000_000
SIZES = (16, 256)


@dataclass(frozen=True)
class ToyFaces:
    """Synthetic faces as uint8 (size, size, 3) with binary attributes; `train`, `val` and `test` count images."""

    size: int = 32
    train: int = 20_000
    val: int = 2_000
    test: int = 2_000
    seed: int = 0

    name: ClassVar[str] = "toy_faces"
    classes: ClassVar[None] = None
    attributes: ClassVar[tuple[str, ...]] = ATTRIBUTES
    columns: ClassVar[frozenset[str]] = frozenset({"attributes", "hidden"})

    def __post_init__(self):
        check_size(self.size, *SIZES)
        for split in FIRST_INDEX:
            if not 0 <= getattr(self, split) <= LARGEST_SPLIT:
                raise DataError(f"{split} {getattr(self, split)}: must be from 0 to {LARGEST_SPLIT:,} images")
        if not self.splits:
            raise DataError("train, val and test are all 0; at least one must be larger")
        if self.seed < 0:
            raise DataError(f"seed {self.seed}: must not be negative")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, 3)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in FIRST_INDEX if getattr(self, split))

    def transform(self) -> dict[str, Any]:
        return {"drawn": f"{self.size} x {self.size}"}

    def description(self) -> dict[str, Any]:
        return {"seed": self.seed, "first_index": {split: FIRST_INDEX[split] for split in self.splits}}

    def records(self, split: str) -> Sequence[Record]:
        return [Record(f"{split}-{i:05d}", FIRST_INDEX[split] + i) for i in range(getattr(self, split))]

    def load(self, record: Record) -> Sample:
        face = sample_factors(self.seed, record.where)
        names = hidden(face)
        return Sample(
            draw_face(face, self.size),
            attributes=tuple(attributes(face).values()),
            hidden=tuple(name in names for name in ATTRIBUTES),
            facts={"index": record.where, "turn": round(face.turn, 4), "tilt": round(face.tilt, 4)},
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = ToyFaces()
    parser.add_argument(
        "--size", type=int, default=defaults.size, help="side in pixels, 16 to 256 (default %(default)s)"
    )
    for split in FIRST_INDEX:
        count = getattr(defaults, split)
        parser.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help=f"images in {split} (default {count:,})"
        )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of the faces (default %(default)s)")


def from_arguments(arguments: argparse.Namespace) -> ToyFaces:
    return ToyFaces(arguments.size, arguments.train, arguments.val, arguments.test, arguments.seed)
