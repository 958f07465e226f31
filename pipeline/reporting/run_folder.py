"""A run folder as a report shows it. Whatever is missing or cannot be read becomes a sentence; the rest is shown."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ALIASES, flatten, load_yaml
from pipeline.reporting.history import History, HistoryReader
from pipeline.storage.attempts import AttemptFacts, read_attempts
from pipeline.storage.run_lock import is_held
from pipeline.storage.status import Status, read_status
from pipeline.tracking.history import PICTURE_FOLDERS, PICTURE_NAME
from shard_data.files import open_regular, read_bounded

MAX_JSON_BYTES = 4 * 2**20
MAX_LOG_BYTES = 4 * 2**20
MAX_EVALUATIONS = 500
MAX_WARNINGS = 20
MAX_LINE = 1000
"""Letters of a line of the log that are shown."""
SIGNS = ("config.yaml", "metrics.jsonl", "status.json", "checkpoints")
"""A folder with none of these is not a run folder."""
STEP_FOLDER = re.compile(r"step_(\d{8,18})")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)")
FORMER_START = re.compile(r"\S+ on \d+ process(es)? on .*")
"""How a run that wrote no attempts.jsonl begins its log."""


@dataclass
class Evaluation:
    """One file of `evaluations/`."""

    file: str
    report: dict[str, Any]


@dataclass
class Run:
    """What a report shows of one run."""

    folder: Path
    name: str
    status: Status
    history: History
    settings: dict[str, Any]
    """By dotted path; empty where they cannot be read."""
    facts: dict[str, Any]
    """Those of the newest checkpoint that can be read."""
    checkpoints: list[int]
    evaluations: list[Evaluation]
    pictures: dict[str, dict[int, Path]]
    """{kind: {step: PNG file}}; a kind is `reconstructions` or `samples/temperature_0.7`."""
    attempts: list[AttemptFacts]
    """The starts of the run; none of a run of an earlier version."""
    started: str
    """Model, processes and device of the last start."""
    held: bool | None
    """Whether a process trains in the folder; None where this machine cannot say."""
    warnings: list[str]
    """The last warnings and errors of the log."""
    changed: float
    """When the newest record or status was written, in seconds since 1970."""
    notes: list[str] = field(default_factory=list)
    """What is missing, and what still works: one sentence each."""


class RunReader:
    """Reads a run folder, again and again while it is trained.

    With `only`, what a table of runs needs: these curves, and neither pictures, evaluations nor the log. Raises
    ValueError for a folder that does not exist or is no run's.
    """

    def __init__(self, folder: Path, only: frozenset[str] | None = None):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give the folder of a run, for instance runs/nvae")
        if not any((folder / name).exists() for name in SIGNS):
            raise ValueError(f"{folder}: not a run folder, as it holds none of {', '.join(SIGNS)}")
        self.folder = folder
        self._brief = only is not None
        self._metrics = HistoryReader(folder / "metrics.jsonl", only)

    def read(self, progress: Callable[[int], object] = lambda num_bytes: None) -> Run:
        """The run as it is now. Calls `progress` with the bytes of `metrics.jsonl` that were read."""
        notes: list[str] = []
        status = read_status(self.folder)
        if status == Status():
            notes.append("status.json is missing or cannot be read: the state and the number of steps are unknown.")
        held = is_held(self.folder) if status.state == "running" else None
        history = self._read_history(progress, notes)
        started, warnings = ("", []) if self._brief else read_log(self.folder / "log.txt", notes)
        attempts = read_attempts(self.folder)
        checkpoints = find_checkpoints(self.folder)
        newest = history.recent[-1][1] if history.recent else 0.0
        return Run(
            folder=self.folder,
            name=self.folder.resolve().name,
            status=status,
            history=history,
            settings=read_settings(self.folder / "config.yaml", notes),
            facts={} if self._brief else read_facts(self.folder, checkpoints),
            checkpoints=checkpoints,
            evaluations=[] if self._brief else read_evaluations(self.folder, notes),
            pictures={} if self._brief else find_pictures(self.folder),
            attempts=attempts,
            started=describe_start(attempts[-1]) if attempts else started,
            held=held,
            warnings=warnings,
            changed=max(status.time, newest),
            notes=notes,
        )

    def _read_history(self, progress: Callable[[int], object], notes: list[str]) -> History:
        try:
            history = self._metrics.read(progress)
        except FileNotFoundError:
            notes.append("There is no metrics.jsonl, so there are no curves; the rest of the folder is shown.")
            return History()
        except OSError as error:
            notes.append(f"metrics.jsonl cannot be read ({error.strerror}), so there are no curves.")
            return History()
        if not history.num_records:
            notes.append("metrics.jsonl holds no record yet, so there are no curves.")
        if history.not_records:
            notes.append(f"{count(history.not_records, 'line')} of metrics.jsonl cannot be read as a record; skipped.")
        if history.out_of_order:
            records = count(history.out_of_order, "record")
            notes.append(f"{records} of metrics.jsonl came after a later step; skipped.")
        if history.names_refused:
            notes.append("metrics.jsonl holds more names, or longer ones, than a report shows; the rest is not shown.")
        return history


def count(number: int, noun: str) -> str:
    """`1 line`, `12 lines`, `2 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def describe_start(facts: AttemptFacts) -> str:
    """`nvae on 2 processes on CPU, 1 thread each, fp32, on HOST`, without what is not known."""
    what = f"{facts.model or 'a model'} on {count(facts.processes, 'process')} on {facts.device or 'a device'}"
    threads = f"{count(facts.threads, 'thread')} each" if facts.threads else ""
    host = f"on {facts.host}" if facts.host else ""
    return printable(", ".join(filter(None, [what, threads, facts.precision, host])))


def seconds_silent(run: Run, now: float | None = None) -> float:
    """Seconds since the run wrote something."""
    return (time.time() if now is None else now) - run.changed


def read_settings(path: Path, notes: list[str]) -> dict[str, Any]:
    """config.yaml by dotted paths."""
    if not path.exists():
        notes.append("There is no config.yaml, so no settings are shown.")
        return {}
    try:
        return {ALIASES.get(name, name): value for name, value in flatten(load_yaml(path)).items()}
    except (OSError, ValueError) as error:
        notes.append(f"config.yaml cannot be read, so no settings are shown: {first_line(str(error))}.")
    return {}


def first_line(text: str) -> str:
    """The first line, of printable letters, bounded."""
    return printable((text.splitlines() or [""])[0][:300]).rstrip(". ")


def printable(text: str) -> str:
    """Text of a run on one line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def find_checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints, ascending."""
    found = (STEP_FOLDER.fullmatch(path.name) for path in entries(folder / "checkpoints"))
    return sorted({int(match[1]) for match in found if match})


def read_facts(folder: Path, checkpoints: list[int]) -> dict[str, Any]:
    """The facts of the newest checkpoint whose meta.json can be read. They are shown and not used, so that the hash of
    meta.json, whose check needs torch, is not compared.
    """
    for step in reversed(checkpoints):
        content = read_json(folder / "checkpoints" / f"step_{step:08d}" / "meta.json")
        if isinstance(content, dict) and isinstance(content.get("facts"), dict):
            return content["facts"]
    return {}


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file; None where there is none that can be read."""
    try:
        return json.loads(read_bounded(path, max_bytes))
    except (OSError, ValueError, RecursionError):
        return None


def read_evaluations(folder: Path, notes: list[str]) -> list[Evaluation]:
    """The reports of evaluate.py, those of earlier versions first."""
    files = sorted(path for path in entries(folder) if path.match("evaluation_*.json"))
    files += sorted(path for path in entries(folder / "evaluations") if path.suffix == ".json")
    if len(files) > MAX_EVALUATIONS:
        notes.append(f"Of {len(files):,} evaluations the first {MAX_EVALUATIONS} are shown.")
    evaluations = []
    for path in files[:MAX_EVALUATIONS]:
        report = read_json(path)
        if isinstance(report, dict) and isinstance(report.get("figures"), dict):
            evaluations.append(Evaluation(path.name, report))
        else:
            name = printable(str(path.relative_to(folder)))
            notes.append(f"{name} is not an evaluation that can be read; skipped.")
    return evaluations


def find_pictures(folder: Path) -> dict[str, dict[int, Path]]:
    """PNG files by kind and step; reconstructions last."""
    found: dict[str, dict[int, Path]] = {}
    for kind in PICTURE_FOLDERS:
        for path in entries(folder / kind):
            if match := PICTURE_NAME.fullmatch(path.name):
                name = f"{kind}/{match[2]}" if match[2] else kind
                found.setdefault(name, {})[int(match[1])] = path
    order = sorted(found, key=lambda name: (PICTURE_FOLDERS.index(name.split("/")[0]), name))
    return {name: dict(sorted(found[name].items())) for name in order}


def entries(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where there is none, or it is a symbolic link."""
    try:
        return [] if folder.is_symlink() else list(folder.iterdir())
    except OSError:
        return []


def read_log(path: Path, notes: list[str]) -> tuple[str, list[str]]:
    """The last start as log.txt describes it, and its last warnings and errors."""
    started, warnings = "", []
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - MAX_LOG_BYTES))
            text = file.read(MAX_LOG_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return "", []
    except OSError as error:
        notes.append(f"log.txt cannot be read ({error.strerror}), so its warnings are not shown.")
        return "", []
    for line in text.splitlines():
        if match := LOG_LINE.fullmatch(line[:MAX_LINE]):
            if FORMER_START.fullmatch(match[3]):
                started = match[3]
            if match[2] in ("WARNING", "ERROR", "CRITICAL"):
                warnings.append(line[:MAX_LINE])
    return started, warnings[-MAX_WARNINGS:]
