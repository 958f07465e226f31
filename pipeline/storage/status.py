"""`status.json` of a run folder: how far the run is, and how its last attempt ended. Written whole or not at all.

`python -m pipeline.status RUN` prints the state alone, for scripts:

    none        no attempt has begun
    running     an attempt is at work; where none is, it was killed: run the same command again
    preempted   stopped on purpose at a step's edge, with a checkpoint: run the same command again
    finished    trained to the last step
    failed      ended by an error that running again does not mend by itself; `reason` says which
"""

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pipeline.storage.atomic import replacing

State = Literal["none", "running", "preempted", "finished", "failed"]
FILE = "status.json"
log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Status:
    """The content of status.json."""

    state: State = "none"
    step: int = 0
    """Of the newest checkpoint: where the next attempt goes on."""
    total_steps: int = 0
    attempt: int = 0
    """How often the run has been started, this time included."""
    reason: str = ""
    """Why it stopped: a signal's name, or an error's message."""
    time: float = 0.0
    """When this was written, in seconds since 1970."""


def read_status(folder: Path) -> Status:
    """What the run folder tells; `none` where there is no status, or a damaged one."""
    try:
        fields = json.loads((folder / FILE).read_text())
        status = Status(**fields)
        well_formed = (
            status.state in get_args(State) and isinstance(status.step, int) and isinstance(status.attempt, int)
        )
    except (OSError, ValueError, TypeError):
        return Status()
    return status if well_formed else Status()


class StatusFile:
    """Keeps a run folder's status. A disk that cannot take it does not end training: that is logged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.status = read_status(folder)

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
            with replacing(self.folder / FILE) as file:
                file.write((json.dumps(dataclasses.asdict(self.status), indent=1) + "\n").encode())
        except OSError as error:
            log.warning("%s could not be written: %s", self.folder / FILE, error.strerror)
