"""The identity of a run: a random id in the file `run_id` of its folder and in the facts of its checkpoints.

A run folder that is copied or moved keeps its id. A checkpoint with another id was written by another run, for instance
by a process that kept training after its folder was replaced.
"""

import re
import uuid
from pathlib import Path

from pipeline.storage.atomic import atomic_file
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import UnreadableCheckpoint, read_meta
from shard_data.files import read_bounded

FILE = "run_id"
_ID = re.compile(r"[0-9a-f]{32}")


def read_run_id(folder: Path) -> str | None:
    """The id that the run folder states, or None for a folder without one."""
    try:
        text = read_bounded(folder / FILE, max_bytes=64).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _ID.fullmatch(text) else None


def find_run_id(folder: Path) -> str:
    """The folder's id; else that of its newest checkpoint that states one; else a new one. Writes nothing."""
    return read_run_id(folder) or _newest_checkpoint_id(Checkpoints(folder / "checkpoints")) or uuid.uuid4().hex


def write_run_id(folder: Path, run_id: str) -> None:
    """State the id in the run folder. Raises OSError."""
    if read_run_id(folder) != run_id:
        with atomic_file(folder / FILE) as file:
            file.write(f"{run_id}\n".encode())


def _newest_checkpoint_id(checkpoints: Checkpoints) -> str | None:
    for step in reversed(checkpoints.steps()):
        try:
            run_id = read_meta(checkpoints.path(step)).facts.get("run_id")
        except UnreadableCheckpoint:
            continue
        if isinstance(run_id, str) and _ID.fullmatch(run_id):
            return run_id
    return None
