"""What a run folder holds of a run's history: the records of `metrics.jsonl`, and the pictures of its PNG files."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.storage.metrics_file import read_records

WALL_CLOCK = "perf/wall_clock_s"
"""Seconds of training over all attempts."""
PICTURE_FOLDERS = ("samples", "reconstructions")
PICTURE_NAME = re.compile(r"step_(\d{8,})(?:_(.+))?\.png")


@dataclass
class LoggedStep:
    """What a run logged at one step."""

    step: int
    time: float
    """Seconds since 1970."""
    scalars: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    """PNG files, by key: `samples/step_00000020_temperature_0.7.png` is `samples/temperature_0.7` of step 20."""


def read_history(run_dir: Path, last_step: int | None = None) -> list[LoggedStep]:
    """The steps of a run folder up to `last_step` (default: the last step of `metrics.jsonl`), in ascending order."""
    steps: dict[int, LoggedStep] = {}
    for record in read_records(run_dir / "metrics.jsonl"):
        step, time = record.pop("step"), record.pop("time")
        steps[step] = LoggedStep(step, time, record)
    if last_step is None:
        last_step = max(steps, default=-1)
    for folder in PICTURE_FOLDERS:
        for path in run_dir.glob(f"{folder}/*.png"):
            if found := PICTURE_NAME.fullmatch(path.name):
                step, suffix = int(found[1]), found[2]
                logged = steps.setdefault(step, LoggedStep(step, path.stat().st_mtime))
                logged.pictures[f"{folder}/{suffix}" if suffix else folder] = path
    return [steps[step] for step in sorted(steps) if step <= last_step]
