"""unfinished.jsonl: the plan of a conversion and its finished shards, so that the same command can resume it.

The first line holds the plan, and the files in the folder that this program may delete. Every further line is a
finished shard. The file is deleted when the manifest is written.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from shard_data.files import PARTIAL, replacing, sha256
from shard_data.manifest import Shard

FILE = "unfinished.jsonl"
_SHARD = TypeAdapter(Shard)


class Journal:
    """The record of an unfinished conversion into `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / FILE
        head, *lines = _lines(self.path) or [None]
        head = head if isinstance(head, dict) else {}
        self.plan: dict[str, Any] | None = head.get("plan")
        names = head.get("ours")
        # Never a file outside of the folder.
        self.ours = [Path(name).name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        self.finished: dict[str, Shard] = {entry["file"]: entry for entry in _entries(lines)}

    def begin(self, plan: dict[str, Any], ours: list[str]) -> None:
        """Start or resume `plan`. Finished shards are kept if the plan is unchanged and their hashes match."""
        kept = [entry for entry in self.finished.values() if plan == self.plan and self._is_intact(entry)]
        self.ours = sorted({*self.ours, *ours})
        self.plan, self.finished = plan, {entry["file"]: entry for entry in kept}
        with replacing(self.path) as file:
            for line in ({"plan": plan, "ours": self.ours}, *kept):
                file.write(_line(line))

    def add(self, entry: dict[str, Any]) -> None:
        """Record a finished shard."""
        self.finished[entry["file"]] = entry
        with open(self.path, "ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def sweep(self) -> None:
        """Delete our files that are not finished shards."""
        keep = {name for entry in self.finished.values() for name in (entry["file"], entry["index"])}
        for name in self.ours:
            (self.folder / (name + PARTIAL)).unlink(missing_ok=True)
            if name not in keep:
                (self.folder / name).unlink(missing_ok=True)

    def end(self) -> None:
        """The set is complete."""
        self.path.unlink(missing_ok=True)

    def _is_intact(self, entry: dict[str, Any]) -> bool:
        hashes = ((entry["file"], entry["sha256"]), (entry["index"], entry["index_sha256"]))
        return all((self.folder / name).is_file() and sha256(self.folder / name) == digest for name, digest in hashes)


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _entries(lines: list[Any]) -> Iterator[Shard]:
    for line in lines:
        with contextlib.suppress(ValidationError):
            yield _SHARD.validate_python(line)


def _lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, RecursionError):  # truncated by a kill: written again
            lines.append(json.loads(line))
    return lines
