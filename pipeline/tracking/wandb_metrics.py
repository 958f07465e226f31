"""How W&B shows each key: its x-axis, what the table of runs shows of it, and whether it has a chart."""

from fnmatch import fnmatchcase
from typing import Any

SUMMARIES = {
    "train/loss": "min,last",
    "*/elbo": "max,last",
    "*/log_px": "max,last",
    "*/bpd": "min,last",
    "*/nll": "min,last",
    "*/bpd_nll": "min,last",
    "train/grad_norm": "max,mean,last",
    "perf/images_per_second": "mean,last",
    "perf/mfu": "mean,last",
    "perf/step_ms": "mean,last",
    "perf/data_wait": "mean,last",
    "perf/gpu_memory_gib": "max,last",
    "perf/host_memory_gib": "max,last",
    "perf/checkpoint_stall_ms": "max,last",
    "perf/*_min": "min,last",
    "perf/*_max": "max,last",
}
"""What W&B's table of runs shows for a key, where it is more than the last value. The first pattern that fits counts.

`min` or `max` states the goal as well: releases of wandb from 0.31 on have no other parameter for it."""

HIDDEN = ("attempt", "samples_seen")
"""Keys for which W&B's page shows no chart unless one is added."""

KL_BY_GROUP = "kl_by_group"
"""The mean KL of each latent group, as one histogram per step. It is derived from the keys `kl/GROUP`."""


class MetricDefinitions:
    """Defines each key of one W&B run before its first value is logged."""

    def __init__(self, run: Any):
        self._run = run
        self._defined: set[str] = set()

    def define(self, key: str) -> None:
        """Does nothing for a key that is defined."""
        if key not in self._defined:
            self._defined.add(key)
            self._run.define_metric(key, step_metric="step", summary=summary_of(key), hidden=key in HIDDEN)


def summary_of(key: str) -> str | None:
    """What the table of runs shows for a key; None: the last value."""
    return next((summary for pattern, summary in SUMMARIES.items() if fnmatchcase(key, pattern)), None)
