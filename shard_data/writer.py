"""Converts a source to a complete shard set.

The plan (header, splits, order, shard size) determines every byte; the number of workers affects only the speed.
"""

import contextlib
import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shard_data import info, plan
from shard_data import manifest as manifests
from shard_data.errors import AlreadyComplete, Damaged, DataError, Incomplete
from shard_data.file_lock import FileLock, LockHeld
from shard_data.journal import Journal
from shard_data.manifest import Manifest
from shard_data.shard import ENCODINGS
from shard_data.source import Omission, Source
from shard_data.terminal import Progress, aligned
from shard_data.workers import ShardWriter, Task, write_all

LOCK = "conversion.lock"

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
    """Write `source` as a shard set into the folder `out`, and return its manifest.

    `shard_size` is the number of samples per shard; the last shard of a split, and shards with skipped samples, hold
    fewer. With a `shuffle_seed` each split is written in a random order that depends on the seed only. The same
    arguments give the same bytes for any number of `workers` (processes). With more than one worker, the main program
    must be guarded by `if __name__ == "__main__"`. An unfinished conversion with the same arguments is resumed.

    Raises Incomplete if originals are missing or unreadable; with `partial` they are skipped and the manifest lists
    them. Raises AlreadyComplete if `out` holds a complete set and `overwrite` is false, and DataError for originals,
    options or folders that cannot be used.
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
                _refuse_complete(folder)  # again: another process may have finished it meanwhile
            journal = _open_folder(writer, json.loads(json.dumps(plan.describe(head, records, tasks))), tasks)
            if progress:
                for line in _first_lines(folder, head, records, tasks, workers):
                    print(line, flush=True)
            entries = _write_shards(writer, tasks, journal, workers, progress)
            unreadable = _pop_omissions(tasks, entries)
            _refuse_incomplete(source, unreadable, partial)
            return _finish(folder, head, _by_split(folder, tasks, entries), [*missing, *unreadable], journal)
    except OSError as error:
        raise DataError(_explain(error, folder)) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder while this process converts into it. Raises DataError if another process holds the lock."""
    existed = folder.exists()
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
        if not existed:
            with contextlib.suppress(OSError):  # deletes an empty folder only
                folder.rmdir()


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
            f"{folder}: already holds a complete set of {name}; use it, choose another --out, or add --overwrite"
        )


def _refuse_incomplete(source: Source, omissions: Sequence[Omission], partial: bool) -> None:
    if not omissions or partial:
        return
    listing = "\n".join(info.describe_omitted(manifests.omitted(omissions)))
    raise Incomplete(
        f"{source.name}: {info.num_files(len(omissions))} missing or unreadable:\n{listing}\n"
        "fix them and run the same command again, or add --partial to skip them and list them in the manifest:"
    )


def _files(tasks: Sequence[Task]) -> list[str]:
    return [f"{task.stem}.{suffix}" for task in tasks for suffix in ("tar", "index.npy")]


def _open_folder(writer: ShardWriter, content: dict[str, Any], tasks: Sequence[Task]) -> Journal:
    """Prepare the folder for the plan. Only files that a manifest or journal of this program names are ever deleted."""
    folder, files = writer.folder, _files(tasks)
    journal = Journal(folder)
    ours = list(journal.ours)
    if (folder / manifests.FILE).exists():
        ours += _files_of_set(folder)
    foreign = [name for name in files if name not in ours and (folder / name).exists()]
    if foreign:
        raise DataError(
            f"{folder / foreign[0]}: would be overwritten, and is not part of a shard set; choose another --out folder"
        )
    plan.check_space(folder, ours, writer.layout, sum(len(task.records) for task in tasks))
    journal.begin(content, [*ours, *files])
    (folder / manifests.FILE).unlink(missing_ok=True)
    journal.sweep()
    return journal


def _files_of_set(folder: Path) -> list[str]:
    try:
        return [shard[name] for shard in manifests.all_shards(manifests.load(folder)) for name in ("file", "index")]
    except Damaged:
        raise DataError(
            f"{folder / manifests.FILE}: damaged, so it is unknown which files belong to the set; "
            "delete the folder, or choose another --out"
        ) from None


def _first_lines(folder: Path, head: Manifest, records: plan.Records, tasks: Sequence[Task], workers: int) -> list[str]:
    """What is written, and how to stop."""
    image = "{height}x{width}x{channels}".format(**head["image"])
    facts = {
        "images": ", ".join(f"{split} {len(rows):,}" for split, rows in records.items()),
        "shards": f"{len(tasks)}, images as {head['encoding']}; {workers} {'process' if workers == 1 else 'processes'}",
        "stop": "Ctrl-C; the same command resumes",
    }
    return [f"{head['name']}: images of {image} into {folder}", *aligned(facts)]


def _write_shards(writer: ShardWriter, tasks: list[Task], journal: Journal, workers: int, progress: bool) -> Entries:
    """The entries of all shards by file name.

    A shard with skipped samples is not recorded as finished: its originals may be fixed before the next run.
    """
    entries = dict(journal.finished)
    open_tasks = [task for task in tasks if f"{task.stem}.tar" not in entries]
    total = sum(len(task.records) for task in open_tasks)
    if progress and len(open_tasks) < len(tasks):
        finished = f"{len(tasks) - len(open_tasks)} of {len(tasks)} shards are finished"
        print(f"{writer.folder}: resuming; {finished}", flush=True)
    with Progress(writer.source.name, total, "images", shown=progress) as bar:
        for entry in write_all(writer, open_tasks, workers, bar):
            entries[entry["file"]] = entry
            if "omitted" not in entry:
                journal.add(entry)
        bar.update(total - bar.done)
    return entries


def _pop_omissions(tasks: Sequence[Task], entries: Entries) -> list[Omission]:
    """Remove from the entries the images that their shards skipped, and return these."""
    return [
        Omission(plan.split_of(task.stem), name, reason)
        for task in tasks
        for name, reason in entries[f"{task.stem}.tar"].pop("omitted", ())
    ]


def _by_split(folder: Path, tasks: Sequence[Task], entries: Entries) -> dict[str, list[dict[str, Any]]]:
    """The shards of every split. A shard without samples is deleted."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        entry = entries[f"{task.stem}.tar"]
        if entry["count"]:
            shards.setdefault(plan.split_of(task.stem), []).append(entry)
            continue
        for name in (entry["file"], entry["index"]):
            (folder / name).unlink()
    if not shards:
        raise DataError(f"{folder}: no set was written, because no original could be read; check --source")
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
        return f"{place}: the disk is full; free some space and run the same command again, which resumes"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{place}: not a folder; choose another --out"
    return f"{place}: cannot be used ({reason}); choose an --out folder that can be written to"
