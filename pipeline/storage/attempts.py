"""`attempts.jsonl` of a run folder: a record for each start of the run, which says what was started, and where."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage.atomic import atomic_file
from shard_data.files import read_bounded

FILE = "attempts.jsonl"
MAX_BYTES = 4 * 2**20
MAX_TEXT = 1000
"""Letters of a text that is read."""
KEPT = 1000
"""Records of the last attempts."""


@dataclass(frozen=True)
class AttemptFacts:
    """One start of a run. A fact that the file lacks has its default."""

    attempt: int = 0
    """Counts the starts from 1 on, as status.json does."""
    time: float = 0.0
    """In seconds since 1970."""
    step: int = 0
    """At which it started."""
    total_steps: int = 0
    model: str = ""
    parameters: int = 0
    latent_groups: int = 0
    data: str = ""
    """Folder or address of the shard set."""
    images: int = 0
    """That are trained on."""
    processes: int = 0
    device: str = ""
    """Product name of the GPU, or CPU."""
    threads: int = 0
    """Of each process, on CPUs."""
    precision: str = ""
    host: str = ""
    """Of the main process."""
    torch: str = ""
    python: str = ""
    code: str = ""
    """The start of a sha256 over the package's sources."""
    revision: str = ""
    """The commit of the code, `-dirty` where files differ from it; empty where the code is no git checkout."""
    data_fingerprint: str = ""
    """Of the shard set's manifest."""

    @property
    def environment(self) -> dict[str, int | float | str]:
        """What the run is trained with: the facts that do not change from start to start on one machine."""
        changing = ("attempt", "time", "step", "total_steps")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in changing}


def read_attempts(folder: Path) -> list[AttemptFacts]:
    """In the order of the file; none where there is no file, or an unreadable one. Lines that are no record, and
    values of another type, are skipped.
    """
    try:
        lines = read_bounded(folder / FILE, MAX_BYTES).splitlines()
    except OSError:
        return []
    return [facts for line in lines if (facts := _parse(line)) is not None]


def _parse(line: bytes) -> AttemptFacts | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    fields = dataclasses.fields(AttemptFacts)
    found = {one.name: _checked(record.get(one.name), one.default) for one in fields}
    return AttemptFacts(**found) if found["attempt"] > 0 else None


def _checked(value: object, default: int | float | str) -> int | float | str:
    """The value, or the default where it is of another type or out of range."""
    if isinstance(default, str):
        return value[:MAX_TEXT] if isinstance(value, str) else default
    if type(value) is not int and type(value) is not type(default):
        return default
    return value if 0 <= value < 2**63 else default


def add_attempt(folder: Path, facts: AttemptFacts) -> None:
    """Adds a record, with the present time. Raises OSError."""
    records = [*read_attempts(folder)[1 - KEPT :], dataclasses.replace(facts, time=round(time.time(), 3))]
    with atomic_file(folder / FILE) as file:
        file.writelines(f"{json.dumps(dataclasses.asdict(record))}\n".encode() for record in records)
