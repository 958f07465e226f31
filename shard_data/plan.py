"""What a conversion will write: which records into which shards, in which order, and whether the disk has the space."""

import hashlib
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

from shard_data.errors import DataError
from shard_data.manifest import Manifest
from shard_data.shard import BLOCK, Layout
from shard_data.source import Record, Source
from shard_data.workers import Task

SHARD_BYTES = 32 << 20
ROUND_NUMBERS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
PNG_SHARE = 0.25  # of the raw bytes, a lower bound for photographs: only what certainly does not fit is refused

Records = dict[str, Sequence[Record]]


def plan_records(source: Source, shuffle_seed: int | None) -> Records:
    """The records of every split that has any, in writing order."""
    records = {split: shuffled(source.records(split), shuffle_seed) for split in source.splits}
    records = {split: rows for split, rows in records.items() if rows}
    if not records:
        raise DataError(f"{source.name}: no images found; check --source")
    return records


def shuffled(records: Sequence[Record], seed: int | None) -> Sequence[Record]:
    """Sorted by a hash of seed and key: the same on every machine and version, for any order of the originals."""
    if seed is None:
        return records
    return sorted(records, key=lambda record: hashlib.sha256(f"{seed}:{record.key}".encode()).digest())


def plan_tasks(records: Records, shard_size: int) -> list[Task]:
    return [
        Task(f"{split}-{number:06d}", rows[start : start + shard_size])
        for split, rows in records.items()
        for number, start in enumerate(range(0, len(rows), shard_size))
    ]


def split_of(stem: str) -> str:
    return stem.rpartition("-")[0]


def plan_layout(source: Source, encoding: str, records: Records) -> Layout:
    key_bytes = max(len(record.key.encode()) for split in records.values() for record in split)
    return Layout(encoding, source.image_shape, source.columns, source.attributes or (), key_bytes)


def describe(head: Manifest, records: Records, tasks: Sequence[Task]) -> Manifest:
    """The plan as the journal compares it: equal plans give equal bytes."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update("\n".join([task.stem, *(record.key for record in task.records)]).encode())
    splits = {split: len(rows) for split, rows in records.items()}
    return {**head, "splits": splits, "shards": {t.stem: len(t.records) for t in tasks}, "keys": digest.hexdigest()}


def default_shard_size(image_shape: tuple[int, int, int]) -> int:
    """Samples per shard: the largest of 1, 2, 5, 10, 20 ... that keeps a shard under about 32 MiB."""
    per_sample = prod(image_shape) + 4 * BLOCK  # the image's header and padding, and one text member
    return max(number for number in ROUND_NUMBERS if number == 1 or number * per_sample <= SHARD_BYTES)


def check_space(folder: Path, ours: Sequence[str], layout: Layout, count: int) -> None:
    """Raise DataError if `count` samples cannot fit into `folder`, even with the files `ours` deleted."""
    sizes = [(folder / name).stat().st_size for name in set(ours) if (folder / name).is_file()]
    room, need = shutil.disk_usage(folder).free + sum(sizes), count * least_bytes(layout)
    if need > room:
        raise DataError(
            f"{folder}: needs at least {_size(need)}, and {_size(room)} are free; "
            "free some space, choose another --out folder, a smaller --size or --encoding png"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def least_bytes(layout: Layout) -> int:
    """A lower bound of the bytes of one sample in tar and index."""
    share = PNG_SHARE if layout.encoding == "png" else 1
    texts = ("label" in layout.columns) + bool(layout.columns - {"label"})
    image = BLOCK + int(share * prod(layout.image_shape))
    return image + 2 * BLOCK * texts + layout.row.itemsize
