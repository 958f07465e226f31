"""Reads and compares run folders."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


def read_lines(path: Path) -> list[dict]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder: Path, without: str = "perf/") -> list[dict]:
    """The records of metrics.jsonl without what depends on time: `time`, `attempt` and keys that begin so."""
    return [
        {key: value for key, value in record.items() if key not in ("time", "attempt") and not key.startswith(without)}
        for record in read_lines(folder / "metrics.jsonl")
    ]


def assert_metrics_close(expected: list[dict], found: list[dict], tolerance: float) -> None:
    """The same keys, and values to a relative tolerance."""
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=tolerance, abs=1e-12), (one["step"], key)


def last_checkpoint(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step_*"))[-1]


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    """Name and content of each tensor file of the last checkpoint."""
    return {file.name: file.read_bytes() for file in sorted(last_checkpoint(folder).glob("*.safetensors"))}


def remove_checkpoints_after(folder: Path, step: int) -> None:
    """As if the run had been killed right after this step's checkpoint."""
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


def differences(expected: Path, found: Path) -> Iterator[str]:
    """What is not equal in two finished runs, one line each: tensors and trace to the byte, and the metrics."""
    ours, theirs = tensor_bytes(expected), tensor_bytes(found)
    if last_checkpoint(expected).name != last_checkpoint(found).name:
        yield f"the last checkpoints are {last_checkpoint(expected).name} and {last_checkpoint(found).name}"
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"{name} differs"
    if (expected / "data_trace.jsonl").read_bytes() != (found / "data_trace.jsonl").read_bytes():
        yield "data_trace.jsonl differs"
    if metrics(expected) != metrics(found):
        yield "metrics.jsonl differs"
    steps = [record["step"] for record in metrics(found)]
    if steps != sorted(set(steps)):
        yield "metrics.jsonl repeats a step"
