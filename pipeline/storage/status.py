"""`status.json` of a run folder: how far the run is, and how its last attempt ended. Written completely or not at all.

`python -m pipeline.status RUN` prints the state alone, for scripts:

    none        no attempt has started
    running     an attempt is running; if none is, it was killed: run the same command again
    preempted   stopped by a signal between two steps, with a checkpoint: run the same command again
    interrupted stopped by Ctrl-C: run the same command again
    finished    trained to the last step
    failed      ended by an error that has to be fixed first; `reason` says which
"""

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pipeline.storage.atomic import atomic_file
from shard_data.files import read_bounded

State = Literal["none", "running", "preempted", "interrupted", "finished", "failed"]
FILE = "status.json"
MAX_BYTES = 2**20
log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Status:
    """The content of status.json."""

    state: State = "none"
    step: int = 0
    """Of the newest checkpoint: where the next attempt resumes."""
    total_steps: int = 0
    attempt: int = 0
    """How often the run has been started, this time included."""
    reason: str = ""
    """Why it stopped: a signal's name, or an error's message."""
    time: float = 0.0
    """When this was written, in seconds since 1970."""


def read_status(folder: Path) -> Status:
    """The status that the run folder states; the state `none` where there is none, or an unreadable one."""
    try:
        fields = json.loads(read_bounded(folder / FILE, MAX_BYTES))
        status = Status(**fields)
    except (OSError, ValueError, TypeError, RecursionError):
        return Status()
    return status if _is_well_formed(status) else Status()


def _is_well_formed(status: Status) -> bool:
    counts = (status.step, status.total_steps, status.attempt)
    return (
        isinstance(status.state, str)
        and status.state in get_args(State)
        and all(type(count) is int and 0 <= count < 2**63 for count in counts)
        and isinstance(status.reason, str)
        and type(status.time) in (int, float)
    )


class StatusFile:
    """Keeps a run folder's status. A disk that cannot take it does not end training: that is logged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.status = read_status(folder)
        self._failing = False

    def begin(self, step: int, total_steps: int) -> int:
        """Notes that an attempt begins at this step. Returns its number, from 1 on."""
        self._write(state="running", step=step, total_steps=total_steps, attempt=self.status.attempt + 1, reason="")
        return self.status.attempt

    def saved(self, step: int) -> None:
        """Notes the newest checkpoint."""
        self._write(step=step)

    def end(self, state: State, reason: str = "") -> None:
        """Notes how the attempt ended."""
        self._write(state=state, reason=reason)

    def _write(self, **changes: object) -> None:
        self.status = dataclasses.replace(self.status, **changes, time=round(time.time(), 3))
        try:
            with atomic_file(self.folder / FILE) as file:
                file.write((json.dumps(dataclasses.asdict(self.status), indent=1) + "\n").encode())
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s could not be written: %s", self.folder / FILE, error.strerror)
            self._failing = True
