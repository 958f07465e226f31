"""The charts of a report, and the numbers that its script draws."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.reporting.history import History
from pipeline.reporting.run_folder import Run


@dataclass(frozen=True)
class Chart:
    """Series that are drawn over each other."""

    title: str
    unit: str
    keys: tuple[str, ...]
    section: str = "Objective"


CHARTS = (
    Chart("Loss", "nats", ("train/loss",)),
    Chart("ELBO", "nats", ("train/elbo", "val/elbo")),
    Chart("Bits per dimension", "bits/dim", ("train/bpd", "val/bpd", "val/bpd_nll")),
    Chart("KL", "nats", ("train/kl", "val/kl")),
    Chart("Reconstruction, log p(x|z)", "nats", ("train/log_px", "val/log_px")),
    Chart("Negative log-likelihood", "nats", ("val/nll",)),
    Chart("Learning rate", "", ("train/lr",), "Optimization"),
    Chart("Beta, weight of the KL", "", ("train/beta",), "Optimization"),
    Chart("Gradient norm", "", ("train/grad_norm",), "Optimization"),
    Chart("Spectral regularizer", "", ("train/spectral",), "Optimization"),
    Chart("Batch norm regularizer", "", ("train/batch_norm",), "Optimization"),
    Chart("Skipped steps", "", ("train/skipped_steps",), "Optimization"),
    Chart("Images per second", "images/s", ("perf/images_per_second",), "Speed"),
    Chart("Time per step", "ms", ("perf/step_ms",), "Speed"),
    Chart("Share of time waiting for data", "", ("perf/data_wait",), "Speed"),
    Chart("Checkpoint stall", "ms", ("perf/checkpoint_stall_ms",), "Speed"),
    Chart("GPU memory, peak", "GiB", ("perf/gpu_memory_gib",), "Speed"),
    Chart("Model FLOPs utilization", "", ("perf/mfu",), "Speed"),
)
ONLY_IF_NOT_ZERO = ("train/skipped_steps", "train/skipped_samples")
SECTIONS = ("Objective", "Optimization", "Speed", "Other")
RANGES = (1024, 512, 256, 128, 64, 32)
"""Ranges of a curve that are tried until the numbers of all curves fit."""
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
            charts.append(Chart(chart.title, chart.unit, keys, chart.section))
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
    points = history.curves[key].points(max_ranges)
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
