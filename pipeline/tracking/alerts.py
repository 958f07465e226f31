"""What a run's metrics call for the attention of: skipped steps, latent groups out of use, and a drop in speed."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple


class Alert(NamedTuple):
    """A message to those who watch a run."""

    title: str
    text: str


class Alerts:
    """Finds what is wrong in the training metrics of one attempt, once each."""

    SLOW_INTERVALS = 3
    """Intervals in a row at less than half of the usual speed: a short hiccup is no alert."""
    USUAL_INTERVALS = 500
    """Those before them whose median is the usual speed: of a run of a million records, the last ones."""

    def __init__(self, beta: float):
        """`beta`: the weight of the KL at the end of the warm-up (`objective.beta`)."""
        self._beta = beta
        self._skipped_until: tuple[float, float, float] | None = None  # step; skips as not finite and by the norm
        self._is_stuck = False
        self._inactive: set[str] = set()
        self._speeds: deque[float] = deque(maxlen=self.USUAL_INTERVALS + self.SLOW_INTERVALS)
        self._is_slow = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Alerts":
        """For a run with these settings."""
        return cls(settings.get("objective", {}).get("beta", 1.0))

    def find(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        """The alerts that the record of `step` calls for."""
        return [*self._skipped(step, scalars), *self._out_of_use(step, scalars), *self._slow(step, scalars)]

    def _skipped(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        """It is usual that `optim.skip_threshold` skips some steps, and not that it skips most of them. The counters
        include earlier attempts, which have sent their own alerts.
        """
        if "train/skipped_steps" not in scalars:
            return []
        by_norm = scalars.get("train/skipped_by_norm", 0.0)
        before, self._skipped_until = self._skipped_until, (step, scalars["train/skipped_steps"] - by_norm, by_norm)
        if before is None:
            return []
        steps, not_finite, by_norm = (now - old for now, old in zip(self._skipped_until, before, strict=True))
        was_stuck, self._is_stuck = self._is_stuck, by_norm > steps / 2
        alerts = []
        if not_finite > 0:
            text = f"{not_finite:g} step(s) of the last interval had a loss or gradient that is not finite."
            alerts.append(Alert("Steps were skipped", f"Step {step}: {text}"))
        if self._is_stuck and not was_stuck:
            text = f"{by_norm:g} of the last {steps:g} steps had a gradient norm above optim.skip_threshold."
            alerts.append(Alert("Most steps are skipped", f"Step {step}: {text} They changed nothing."))
        return alerts

    def _out_of_use(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        """During the warm-up the KL has little weight, and groups may still come into use."""
        if scalars.get("train/beta", 0.0) < self._beta:
            return []
        active = {key.partition("/")[2]: value for key, value in scalars.items() if key.startswith("active_units/")}
        new = sorted(group for group, value in active.items() if value == 0 and group not in self._inactive)
        self._inactive |= set(new)
        if not new:
            return []
        text = f"Step {step}: no unit of {', '.join(new)} has a mean KL above 0.1 nats after the warm-up."
        return [Alert("Latent groups are out of use", text)]

    def _slow(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        speed = scalars.get("perf/images_per_second")
        if speed is None:
            return []
        self._speeds.append(speed)
        speeds = list(self._speeds)
        recent, before = speeds[-self.SLOW_INTERVALS :], speeds[: -self.SLOW_INTERVALS]
        if len(before) < self.SLOW_INTERVALS:
            return []
        usual, was_slow = median(before), self._is_slow
        self._is_slow = all(value < usual / 2 for value in recent)
        if was_slow or not self._is_slow:
            return []
        text = (
            f"Step {step}: {speed:.4g} images/s over {self.SLOW_INTERVALS} intervals; before, {usual:.4g} were usual."
        )
        return [Alert("Training is at half its speed", text)]
