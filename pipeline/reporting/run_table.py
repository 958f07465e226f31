"""The runs below a folder as rows of a table: found, read again and again, filtered, sorted."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline.reporting.run_folder import Run, RunReader, first_line, printable
from pipeline.reporting.summary import BITS, OBJECTIVES, best_of, objective_of, summarize

SIGNS = ("metrics.jsonl", "status.json", "checkpoints")
"""A folder with one of these is a run's."""
MAX_DEPTH = 3
"""Folders in each other in which runs are looked for: runs/SWEEP/SEED/NAME."""
SPEED = "perf/images_per_second"
READ = frozenset({SPEED, *(objective.key for objective in OBJECTIVES + BITS)})
"""The curves from which a row is made."""
STATES = ("running", "killed", "preempted", "interrupted", "finished", "failed", "unknown")


@dataclass(frozen=True)
class Row:
    """One run. What is not known is None or empty."""

    name: str
    """The folder, from the folder that was searched."""
    folder: str
    model: str
    data: str
    state: str
    """One of STATES, or `running?`: see `summary.judge_running`."""
    reason: str
    step: int
    total_steps: int
    seconds_left: float | None
    objective: str
    """`ELBO` (nats) or `bits/dim`, after the split: `val ELBO`, `test ELBO`, `train bits/dim`."""
    newest: float | None
    best: float | None
    best_step: int | None
    larger_is_better: bool
    images_per_second: float | None
    time: float
    """When the run wrote something last, in seconds since 1970."""
    age_seconds: float
    """Since then."""
    attempts: int
    notes: tuple[str, ...]
    """What is missing or cannot be read."""
    tone: str
    """Of the state: see `summary.Summary`."""


def row_of(run: Run, name: str, now: float | None = None) -> Row:
    """The row of one run at this moment."""
    now = time.time() if now is None else now
    summary, objective, facts = summarize(run, now), objective_of(run), run.attempts[-1] if run.attempts else None
    best = best_of(run, objective) if objective else None
    split = run.settings.get("validation.split", "val") if objective and objective.held_out else "train"
    return Row(
        name=printable(name),
        folder=str(run.folder),
        model=_text(run.settings.get("model.name")) or (facts.model if facts else ""),
        data=_text(run.settings.get("data.root")) or (facts.data if facts else ""),
        state="unknown" if run.status.state == "none" else summary.state,
        reason=first_line(summary.reason),
        step=summary.step,
        total_steps=summary.total_steps,
        seconds_left=summary.seconds_left,
        objective=f"{_text(split)} {objective.label}" if objective else "",
        newest=run.history.last(objective.key) if objective else None,
        best=best[1] if best else None,
        best_step=best[0] if best else None,
        larger_is_better=bool(objective and objective.larger_is_better),
        images_per_second=run.history.last(SPEED),
        time=run.changed if math.isfinite(run.changed) else 0.0,
        age_seconds=max(0.0, now - run.changed) if math.isfinite(run.changed) else 0.0,
        attempts=run.status.attempt,
        notes=tuple(run.notes),
        tone=summary.tone,
    )


def _text(value: object) -> str:
    return printable(value)[:200] if isinstance(value, str) else ""


def as_json(row: Row) -> dict[str, Any]:
    """The row for programs."""
    fields = asdict(row)
    del fields["tone"], fields["larger_is_better"]
    return fields


class RunList:
    """The runs below a folder. Each call of `read` reads what is new since the last one.

    Raises ValueError where there is no such folder.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder; give the folder that holds run folders (default: runs)")
        self.root = root
        self._readers: dict[Path, RunReader] = {}

    def find(self) -> list[Path]:
        """The run folders at this moment."""
        known, self._readers = self._readers, {}
        for folder in find_runs(self.root):
            with suppress(ValueError):  # a folder that was deleted since it was found
                self._readers[folder] = known.get(folder) or RunReader(folder, READ)
        return self.folders

    @property
    def folders(self) -> list[Path]:
        """Those that `find` found."""
        return list(self._readers)

    def read(self, progress: Callable[[int], object] = lambda num_bytes: None) -> list[Row]:
        """A row for each run that `find` found. Calls `progress` with the bytes of `metrics.jsonl` that were read."""
        return [row_of(reader.read(progress), self._name(folder)) for folder, reader in self._readers.items()]

    def _name(self, folder: Path) -> str:
        return str(folder.relative_to(self.root)) if folder != self.root else folder.resolve().name


def find_runs(folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """The run folders at and below a folder, sorted by name. No run is looked for inside a run, behind a symbolic link,
    or in a folder that cannot be read or whose name begins with a dot.
    """
    try:
        with os.scandir(folder) as found:
            entries = {entry.name: entry.is_dir(follow_symlinks=False) for entry in found}
    except OSError:
        return
    if any(name in entries for name in SIGNS):
        yield folder
    elif depth:
        for name in sorted(name for name, is_folder in entries.items() if is_folder and not name.startswith(".")):
            yield from find_runs(folder / name, depth - 1)


# ------------------------------------------------------------------------------------------------------ filter, sort


@dataclass(frozen=True)
class Wanted:
    """Which rows are shown, and in which order."""

    states: Sequence[str] = ()
    """Empty: all."""
    name: str = ""
    """A part of it; may hold `*` and `?`."""
    model: str = ""
    data: str = ""
    sort: str = "age"
    reverse: bool = False


ORDERS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: row.name.casefold(),
    "model": lambda row: row.model or None,
    "data": lambda row: row.data or None,
    "state": lambda row: STATES.index(row.state.rstrip("?")),
    "step": lambda row: -row.step,
    "left": lambda row: row.seconds_left,
    "newest": lambda row: _score(row, row.newest),
    "best": lambda row: _score(row, row.best),
    "speed": lambda row: None if row.images_per_second is None else -row.images_per_second,
    "age": lambda row: row.age_seconds,
    "attempts": lambda row: -row.attempts,
}
"""By the names that `--sort` takes: what comes first is smallest; None comes last, also in the reverse order."""


def _score(row: Row, value: float | None) -> tuple[str, float] | None:
    """The best of one objective first; objectives cannot be compared with each other."""
    return None if value is None else (row.objective, -value if row.larger_is_better else value)


def select(rows: Sequence[Row], wanted: Wanted) -> list[Row]:
    """The rows that are wanted, sorted; equal ones by name."""
    kept = sorted((row for row in rows if _is_wanted(row, wanted)), key=lambda row: row.name)
    order = ORDERS[wanted.sort]
    known = [row for row in kept if order(row) is not None]
    known.sort(key=order, reverse=wanted.reverse)
    return [*known, *(row for row in kept if order(row) is None)]


def _is_wanted(row: Row, wanted: Wanted) -> bool:
    if wanted.states and row.state.rstrip("?") not in wanted.states:
        return False
    parts = ((row.name, wanted.name), (row.model, wanted.model), (row.data, wanted.data))
    return all(fnmatchcase(value, f"*{pattern}*") for value, pattern in parts)
