"""Splits of originals that have none: a hash of each sample's name and the seed decides."""

import argparse
import hashlib
from dataclasses import dataclass
from typing import Any

from shard_data.errors import DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class HashSplit:
    """`val` and `test` are shares in [0, 1); the rest is train. A sample stays in its split when others come or go."""

    val: float = 0.05
    test: float = 0.05
    seed: int = 0

    def __post_init__(self):
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise DataError(f"val {self.val} and test {self.test}: must be shares from 0 to 1 whose sum is below 1")

    def of(self, name: str) -> str:
        """The split of a sample."""
        number = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "big")
        share = number / 2**64
        return "test" if share < self.test else "val" if share < self.test + self.val else "train"

    def description(self) -> dict[str, Any]:
        """For the manifest."""
        return {"val": self.val, "test": self.test, "seed": self.seed}


def add_arguments(parser: argparse.ArgumentParser, condition: str = "") -> None:
    for split in ("val", "test"):
        share = f"share of {split}{condition} (default %(default)s)"
        parser.add_argument(f"--{split}", type=float, default=getattr(HashSplit, split), metavar="SHARE", help=share)
    seed = "seed of the split by hash (default %(default)s)"
    parser.add_argument("--split-seed", type=int, default=HashSplit.seed, metavar="SEED", help=seed)


def from_arguments(arguments: argparse.Namespace) -> HashSplit:
    return HashSplit(arguments.val, arguments.test, arguments.split_seed)
