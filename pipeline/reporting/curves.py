"""The charts of a report, and the numbers that its script draws."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.reporting.history import History
from pipeline.reporting.run_folder import Run
from pipeline.reporting.thinning import Envelope


@dataclass(frozen=True)
class Chart:
    """Series that are drawn over each other."""

    title: str
    unit: str
    keys: tuple[str, ...]
    section: str = "Objective"
    has_outliers: bool = True
    """A few values may be far from the others, and are then outside of the axis at first."""


def of_ranks(key: str) -> tuple[str, ...]:
    """The series of the main process, and the smallest and the largest of all processes."""
    return key, f"{key}_min", f"{key}_max"


CHARTS = (
    Chart("Loss", "nats", ("train/loss",)),
    Chart("ELBO", "nats", ("train/elbo", "val/elbo")),
    Chart("Bits per dimension", "", ("train/bpd", "val/bpd", "val/bpd_nll")),
    Chart("KL", "nats", ("train/kl", "val/kl")),
    Chart("Reconstruction, log p(x|z)", "nats", ("train/log_px", "val/log_px")),
    Chart("Negative log-likelihood", "nats", ("val/nll",)),
    Chart("Learning rate", "", ("train/lr",), "Optimization", has_outliers=False),
    Chart("Beta, weight of the KL", "", ("train/beta",), "Optimization", has_outliers=False),
    Chart("Gradient norm", "", ("train/grad_norm",), "Optimization"),
    Chart("Spectral regularizer", "", ("train/spectral",), "Optimization"),
    Chart("Batch norm regularizer", "", ("train/batch_norm",), "Optimization"),
    Chart("Skipped steps", "", ("train/skipped_steps", "train/skipped_by_norm"), "Optimization"),
    Chart("Images per second", "", ("perf/images_per_second",), "Speed"),
    Chart("Time per step", "ms", of_ranks("perf/step_ms"), "Speed"),
    Chart("Share of time waiting for data", "", of_ranks("perf/data_wait"), "Speed"),
    Chart("Checkpoint stall", "ms", ("perf/checkpoint_stall_ms",), "Speed", has_outliers=False),
    Chart("GPU memory, peak", "GiB", of_ranks("perf/gpu_memory_gib"), "Speed"),
    Chart("Host memory, peak", "GiB", of_ranks("perf/host_memory_gib"), "Speed"),
    Chart("Model FLOPs utilization", "", ("perf/mfu",), "Speed"),
)
ONLY_IF_NOT_ZERO = ("train/skipped_steps", "train/skipped_samples")
SECTIONS = ("Objective", "Optimization", "Speed", "Other")
RANGES = (1024, 512, 256, 128, 64, 32)
"""Ranges of a curve that are tried until the numbers of all curves fit."""
MAX_CLOCK_RANGES = 128
GROUP = re.compile(r"(\d+)x(\d+)_group(\d+)")


def plan_charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts that these runs have numbers for. A series that has no chart of its own gets one, under Other."""
    present = {key: None for run in runs for key, curve in run.history.curves.items() if curve.last is not None}
    silent = {
        key
        for key in ONLY_IF_NOT_ZERO
        if all(run.history.best.get(key, ((0, 0.0), (0, 0.0)))[1][1] == 0 for run in runs)
    }
    charts = []
    for chart in CHARTS:
        keys = tuple(key for key in chart.keys if key in present and key not in silent)
        if keys:
            charts.append(replace(chart, keys=keys))
    known = {key for chart in CHARTS for key in chart.keys}
    return charts + [Chart(key, "", (key,), "Other") for key in present if key not in known | silent]


def curves_within(runs: Sequence[Run], charts: Sequence[Chart], max_bytes: int) -> tuple[list[dict[str, Any]], int]:
    """For each run {key: [steps, values]}, thinned until all take at most `max_bytes` of JSON; and the ranges that a
    curve has at most.
    """
    keys = [key for chart in charts for key in chart.keys]
    for max_ranges in RANGES:
        curves = [{key: _curve(run.history, key, max_ranges) for key in keys if _has(run, key)} for run in runs]
        if len(json.dumps(curves, separators=(",", ":"))) <= max_bytes:
            break
    return curves, max_ranges


def _has(run: Run, key: str) -> bool:
    curve = run.history.curves.get(key)
    return curve is not None and curve.last is not None


def _curve(history: History, key: str, max_ranges: int) -> list[list[float]]:
    return _columns(history.curves[key], max_ranges)


def clock(history: History) -> list[list[float]] | None:
    """[steps, seconds of training until then], between which a straight line is close. None where they are unknown."""
    return _columns(history.clock, MAX_CLOCK_RANGES) if history.clock.last else None


def _columns(series: Envelope, max_ranges: int) -> list[list[float]]:
    points = series.points(max_ranges)
    return [[step for step, _ in points], [rounded(value) for _, value in points]]


def rounded(value: float) -> float:
    """Six significant digits, which is more than a screen can show."""
    return float(f"{value:.6g}")


def heat_map(history: History, name: str) -> dict[str, Any] | None:
    """Rows, columns and means of a heat map; the groups in the order of sampling. None where there is none."""
    rows, steps, means = history.groups[name].table()
    if not rows:
        return None
    order = sorted(range(len(rows)), key=lambda i: group_order(rows[i]))
    return {
        "rows": [rows[i] for i in order],
        "steps": steps,
        "last": history.last_step,
        "values": [[None if mean is None else rounded(mean) for mean in means[i]] for i in order],
    }


def group_order(name: str) -> tuple[int, int, str]:
    """By resolution, then by number: `4x4_group10` before `16x16_group02`."""
    match = GROUP.fullmatch(name)
    return (int(match[1]), int(match[3]), name) if match else (2**63, 0, name)


def restarts(history: History) -> list[dict[str, int]]:
    """Where attempts after the first one begin: the first step that each has logged."""
    return [{"step": attempt.first_step, "attempt": attempt.number} for attempt in history.attempts[1:]]
