"""Splits of originals that have none: a hash of each sample's name and the seed decides."""

import argparse
import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shard_data.errors import DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class HashSplit:
    """`val` and `test` are shares in [0, 1), or both whole numbers of samples; the rest is train.

    By shares, a sample stays in its split when others come or go. Numbers are exact: the samples with the smallest
    hashes are test, the next ones val.
    """

    val: float = 0.05
    test: float = 0.05
    seed: int = 0

    def __post_init__(self):
        shares = 0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1
        numbers = self.val >= 0 and self.test >= 0 and isinstance(self.val + self.test, int)
        if not (shares or numbers):
            raise DataError(
                f"val {self.val} and test {self.test}: must be shares from 0 to 1 whose sum is below 1, "
                "or both whole numbers of images"
            )

    def assign(self, names: Sequence[str], place: str) -> list[str]:
        """The split of each sample. Raises DataError with `place` if the numbers leave none for train."""
        hashes = [self._hash(name) for name in names]
        order, first, last = sorted(hashes), self.test, self.test + self.val
        if last < 1:
            first, last = (bisect_left(order, share, key=lambda number: number / 2**64) for share in (first, last))
        elif last >= len(order):
            raise DataError(f"{place}: val {self.val} and test {self.test} of {len(order)} images leave none for train")
        by_hash = dict(zip(order, ["test"] * first + ["val"] * (last - first) + ["train"] * len(order), strict=False))
        return [by_hash[one] for one in hashes]

    def _hash(self, name: str) -> int:
        """In [0, 2^64)."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "big")

    def description(self) -> dict[str, Any]:
        """For the manifest."""
        return {"val": self.val, "test": self.test, "seed": self.seed}


def share_or_number(text: str) -> float:
    """A command line's 0.1, or 3000, which is a number of samples."""
    return int(text) if text.isdecimal() else float(text)


def add_arguments(parser: argparse.ArgumentParser, condition: str = "") -> None:
    for split in ("val", "test"):
        what = f"share of {split} below 1, or number of its images{condition} (default %(default)s)"
        default = getattr(HashSplit, split)
        parser.add_argument(f"--{split}", type=share_or_number, default=default, metavar="SHARE", help=what)
    seed = "seed of the split by hash (default %(default)s)"
    parser.add_argument("--split-seed", type=int, default=HashSplit.seed, metavar="SEED", help=seed)
