"""Conversion: a source in, a complete shard set out.

The plan (header, splits, shard size) decides every byte; the workers only decide how fast it is carried out.
"""

import errno
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shard_data import manifest as manifests
from shard_data.errors import AlreadyComplete, DataError
from shard_data.journal import Journal
from shard_data.manifest import Manifest
from shard_data.shard import BLOCK, ENCODINGS, Layout
from shard_data.source import Record, Source
from shard_data.workers import ShardWriter, Task, write_all

SHARD_BYTES = 32 << 20
ROUND_NUMBERS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

Records = dict[str, Sequence[Record]]


def convert(
    source: Source,
    out: str | Path,
    *,
    encoding: str = "npy",
    shard_size: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write the whole of `source` as a shard set into the folder `out`, and return its manifest.

    `shard_size` is in samples per shard; every shard of a split but the last holds as many. The same arguments give the
    same bytes for any number of `workers` (processes); with more than one, the main program must be guarded by
    `if __name__ == "__main__"`. An unfinished conversion of the same content goes on where it stopped. Raises
    AlreadyComplete where `out` holds a complete set and `overwrite` is not given, DataError for originals, options or
    folders that cannot be used.
    """
    folder = Path(out)
    _check_options(encoding, shard_size, workers)
    if not overwrite:
        _refuse_complete(folder)
    head = manifests.header(source, encoding)
    records = {split: source.records(split) for split in source.splits}
    layout = _layout(source, encoding, records)
    tasks = _tasks(records, shard_size or default_shard_size(source.image_shape))
    try:
        journal = _open_folder(folder, _plan(head, records, tasks), _files(tasks))
        _carry_out(ShardWriter(source, folder, layout), tasks, journal, workers, progress)
        return _finish(folder, head, tasks, journal)
    except OSError as error:
        raise DataError(_explain(error, folder)) from error


def default_shard_size(image_shape: tuple[int, int, int]) -> int:
    """Samples per shard: the largest of 1, 2, 5, 10, 20 ... that keeps a shard under about 32 MiB."""
    per_sample = prod(image_shape) + 4 * BLOCK  # the image's header and padding, and a member of text beside it
    return max(number for number in ROUND_NUMBERS if number == 1 or number * per_sample <= SHARD_BYTES)


def _check_options(encoding: str, shard_size: int | None, workers: int) -> None:
    if encoding not in ENCODINGS:
        raise DataError(f"encoding {encoding!r}: must be one of {', '.join(ENCODINGS)}")
    if shard_size is not None and shard_size < 1:
        raise DataError(f"shard size {shard_size}: must be at least 1 sample")
    if workers < 1:
        raise DataError(f"workers {workers}: must be at least 1 process")


def _refuse_complete(folder: Path) -> None:
    if (folder / manifests.FILE).exists():
        name = manifests.load(folder)["name"]
        raise AlreadyComplete(
            f"{folder} already holds a complete set of {name}; use it, or add --overwrite to make it anew"
        )


def _layout(source: Source, encoding: str, records: Records) -> Layout:
    key_bytes = max(len(record.key.encode()) for split in records.values() for record in split)
    return Layout(encoding, source.image_shape, source.columns, source.attributes or (), key_bytes)


def _tasks(records: Records, shard_size: int) -> list[Task]:
    return [
        Task(f"{split}-{number:06d}", rows[start : start + shard_size])
        for split, rows in records.items()
        for number, start in enumerate(range(0, len(rows), shard_size))
    ]


def _plan(head: Manifest, records: Records, tasks: list[Task]) -> dict[str, Any]:
    plan = {
        **head,
        "splits": {s: len(rows) for s, rows in records.items()},
        "shards": {t.stem: len(t.records) for t in tasks},
    }
    return json.loads(json.dumps(plan))  # as the journal will give it back


def _files(tasks: Sequence[Task]) -> list[str]:
    return [f"{task.stem}.{suffix}" for task in tasks for suffix in ("tar", "index.npy")]


def _open_folder(folder: Path, plan: dict[str, Any], files: list[str]) -> Journal:
    """Make the folder ready for the plan. Only files that a manifest or journal of ours names are ever deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    ours = list(journal.ours)
    if (folder / manifests.FILE).exists():
        ours += [shard[name] for shard in manifests.all_shards(manifests.load(folder)) for name in ("file", "index")]
    strangers = [name for name in files if name not in ours and (folder / name).exists()]
    if strangers:
        raise DataError(
            f"{folder / strangers[0]}: is in the way and not part of a set made here; choose another --out folder"
        )
    journal.begin(plan, [*ours, *files])
    (folder / manifests.FILE).unlink(missing_ok=True)
    journal.sweep()
    return journal


def _carry_out(writer: ShardWriter, tasks: list[Task], journal: Journal, workers: int, progress: bool) -> None:
    open_tasks = [task for task in tasks if f"{task.stem}.tar" not in journal.finished]
    total = sum(len(task.records) for task in open_tasks)
    if progress and len(open_tasks) < len(tasks):
        tqdm.write(
            f"{writer.folder}: going on; {len(tasks) - len(open_tasks)} of {len(tasks)} shards are finished already"
        )
    with tqdm(total=total, unit=" images", desc=writer.source.name, disable=not progress) as bar:
        for entry in write_all(writer, open_tasks, workers, bar):
            journal.add(entry)
        bar.update(total - bar.n)


def _finish(folder: Path, head: Manifest, tasks: list[Task], journal: Journal) -> Manifest:
    shards: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        split = task.stem.rpartition("-")[0]
        shards.setdefault(split, []).append(journal.finished[f"{task.stem}.tar"])
    manifest = manifests.complete(head, shards)
    manifests.save(manifest, folder)
    journal.end()
    return manifest


def _explain(error: OSError, folder: Path) -> str:
    place, reason = error.filename or folder, error.strerror or error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}: the disk is full; free some space and run the same command again, and it goes on"
    return f"{place}: cannot be used ({reason}); choose an --out folder that you may write to"
