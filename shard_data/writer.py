"""Conversion: a source in, a complete shard set out.

The plan (header, splits, order, shard size) decides every byte; the workers only decide how fast it is carried out.
"""

import contextlib
import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shard_data import manifest as manifests
from shard_data import plan
from shard_data.errors import AlreadyComplete, DataError, Incomplete
from shard_data.file_lock import FileLock, LockHeld
from shard_data.journal import Journal
from shard_data.manifest import Manifest
from shard_data.shard import ENCODINGS
from shard_data.source import Omission, Source
from shard_data.workers import ShardWriter, Task, write_all

LOCK = "conversion.lock"
SHOWN = 10  # names per reason in a message; the manifest of a partial set has them all

Entries = dict[str, dict[str, Any]]


def convert(
    source: Source,
    out: str | Path,
    *,
    encoding: str = "npy",
    shard_size: int | None = None,
    shuffle_seed: int | None = None,
    partial: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write the whole of `source` as a shard set into the folder `out`, and return its manifest.

    `shard_size` is in samples per shard; every shard of a split but the last holds as many, less what is left out of
    it. With a `shuffle_seed` each split is written in a random order that the seed decides. The same arguments give the
    same bytes for any number of `workers` (processes); with more than one, the main program must be guarded by
    `if __name__ == "__main__"`. An unfinished conversion of the same content goes on where it stopped.

    Raises Incomplete where originals are missing or unreadable; with `partial` they are left out and the manifest
    lists them. Raises AlreadyComplete where `out` holds a complete set and `overwrite` is not given, DataError for
    originals, options or folders that cannot be used.
    """
    folder = Path(out)
    _check_options(encoding, shard_size, workers)
    if not overwrite:
        _refuse_complete(folder)
    head = manifests.header(source, encoding, shuffle_seed)
    missing = list(getattr(source, "omissions", ()))
    _refuse_incomplete(source, missing, partial)
    records = plan.plan_records(source, shuffle_seed)
    tasks = plan.plan_tasks(records, shard_size or plan.default_shard_size(source.image_shape))
    writer = ShardWriter(source, folder, plan.plan_layout(source, encoding, records))
    try:
        with _locked(folder):
            if not overwrite:
                _refuse_complete(folder)  # again: another process may have finished since
            journal = _open_folder(writer, json.loads(json.dumps(plan.describe(head, records, tasks))), tasks)
            entries = _carry_out(writer, tasks, journal, workers, progress)
            unreadable = _take_omissions(tasks, entries)
            _refuse_incomplete(source, unreadable, partial)
            return _finish(folder, head, _by_split(folder, tasks, entries), [*missing, *unreadable], journal)
    except OSError as error:
        raise DataError(_explain(error, folder)) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder while this process converts into it. Raises DataError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire()
    except LockHeld as error:
        raise DataError(
            f"{folder}: {error.holder} is converting into this folder; wait until it ends, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release(delete=True)


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


def _refuse_incomplete(source: Source, omissions: Sequence[Omission], partial: bool) -> None:
    if not omissions or partial:
        return
    lines = []
    for entry in manifests.omitted(omissions):
        more = f" and {entry['count'] - SHOWN:,} more" if entry["count"] > SHOWN else ""
        lines.append(
            f"  {entry['split']}: {entry['count']:,}, {entry['reason']}: {', '.join(entry['names'][:SHOWN])}{more}"
        )
    listing = "\n".join(lines)
    raise Incomplete(
        f"{source.name}: {len(omissions):,} originals are missing or cannot be used:\n{listing}\n"
        "mend them and run the same command again, or add --partial to leave them out and list them in the manifest"
    )


def _files(tasks: Sequence[Task]) -> list[str]:
    return [f"{task.stem}.{suffix}" for task in tasks for suffix in ("tar", "index.npy")]


def _open_folder(writer: ShardWriter, content: dict[str, Any], tasks: Sequence[Task]) -> Journal:
    """Make the folder ready for the plan. Only files that a manifest or journal of ours names are ever deleted."""
    folder, files = writer.folder, _files(tasks)
    journal = Journal(folder)
    ours = list(journal.ours)
    if (folder / manifests.FILE).exists():
        ours += [shard[name] for shard in manifests.all_shards(manifests.load(folder)) for name in ("file", "index")]
    strangers = [name for name in files if name not in ours and (folder / name).exists()]
    if strangers:
        raise DataError(
            f"{folder / strangers[0]}: is in the way and not part of a set made here; choose another --out folder"
        )
    plan.check_space(folder, ours, writer.layout, sum(len(task.records) for task in tasks))
    journal.begin(content, [*ours, *files])
    (folder / manifests.FILE).unlink(missing_ok=True)
    journal.sweep()
    return journal


def _carry_out(writer: ShardWriter, tasks: list[Task], journal: Journal, workers: int, progress: bool) -> Entries:
    """The entries of all shards by file name.

    A shard with gaps is not noted as finished: its originals may be mended before the next run.
    """
    entries = dict(journal.finished)
    open_tasks = [task for task in tasks if f"{task.stem}.tar" not in entries]
    total = sum(len(task.records) for task in open_tasks)
    if progress and len(open_tasks) < len(tasks):
        tqdm.write(
            f"{writer.folder}: going on; {len(tasks) - len(open_tasks)} of {len(tasks)} shards are finished already"
        )
    with tqdm(total=total, unit=" images", desc=writer.source.name, disable=None if progress else True) as bar:
        for entry in write_all(writer, open_tasks, workers, bar):
            entries[entry["file"]] = entry
            if "omitted" not in entry:
                journal.add(entry)
        bar.update(total - bar.n)
    return entries


def _take_omissions(tasks: Sequence[Task], entries: Entries) -> list[Omission]:
    """Take out of the entries what their shards had to leave out."""
    return [
        Omission(plan.split_of(task.stem), name, reason)
        for task in tasks
        for name, reason in entries[f"{task.stem}.tar"].pop("omitted", ())
    ]


def _by_split(folder: Path, tasks: Sequence[Task], entries: Entries) -> dict[str, list[dict[str, Any]]]:
    """The shards of every split; a shard of which nothing could be read goes away."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        entry = entries[f"{task.stem}.tar"]
        if entry["count"]:
            shards.setdefault(plan.split_of(task.stem), []).append(entry)
            continue
        for name in (entry["file"], entry["index"]):
            (folder / name).unlink()
    if not shards:
        raise DataError(f"{folder}: not one original could be read, so there is no set; check what --source leads to")
    return shards


def _finish(
    folder: Path,
    head: Manifest,
    shards: dict[str, list[dict[str, Any]]],
    omissions: Sequence[Omission],
    journal: Journal,
) -> Manifest:
    manifest = manifests.complete(head, shards, omissions)
    manifests.save(manifest, folder)
    journal.end()
    return manifest


def _explain(error: OSError, folder: Path) -> str:
    place, reason = error.filename or folder, error.strerror or error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}: the disk is full; free some space and run the same command again, and it goes on"
    return f"{place}: cannot be used ({reason}); choose an --out folder that you may write to"
