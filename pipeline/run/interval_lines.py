"""The line of each interval on the terminal and in log.txt, aligned with the others, with the time that is left."""

import math
import time
from collections.abc import Callable, Mapping

SHOWN = {
    "train/loss": "loss",
    "train/elbo": "elbo",
    "train/bpd": "bpd",
    "train/kl": "kl",
    "train/lr": "lr",
}
"""The metrics that a line shows, and their names there."""
SPEED = "perf/images_per_second"
WIDTHS = {"bpd": 6, "kl": 7}
WIDTH = 8


class IntervalLines:
    """Makes the lines of one attempt. `clock` is in seconds."""

    def __init__(self, total_steps: int, batch_size: int, clock: Callable[[], float] = time.monotonic):
        self._total, self._batch_size, self._clock = total_steps, batch_size, clock
        self._first: tuple[int, float] | None = None  # step and time of the first line

    def training(self, step: int, scalars: Mapping[str, float]) -> str:
        """`step  40/1600    2 %  loss  15648.2  ...  51.9 images/s   0:04:01 left`."""
        parts = [f"{100 * step // self._total:3d} %"]
        parts += [_labeled(name, scalars[key]) for key, name in SHOWN.items() if key in scalars]
        if SPEED in scalars:
            parts.append(f"{scalars[SPEED]:>6.{1 if scalars[SPEED] < 1000 else 0}f} images/s")
        left = self._seconds_left(step, scalars.get(SPEED, math.nan))
        if math.isfinite(left):
            parts.append(f"{clock_time(left):>8} left")
        return self._line(step, parts)

    def validation(self, step: int, figures: Mapping[str, float]) -> str:
        """The figures of the held-out split, below those of training."""
        return self._line(
            step, ["val  ", *(_labeled(name.removeprefix("val/"), value) for name, value in figures.items())]
        )

    def _line(self, step: int, parts: list[str]) -> str:
        return f"step {step:>{len(str(self._total))}}/{self._total}  {'  '.join(parts)}"

    def _seconds_left(self, step: int, images_per_second: float) -> float:
        """At the pace since the first line of this attempt, with validation, pictures and checkpoints; in the first
        line, by the speed of training alone. NaN where that is unknown.
        """
        now = self._clock()
        if self._first is None:
            self._first = step, now
        if step > self._first[0]:
            return (now - self._first[1]) / (step - self._first[0]) * (self._total - step)
        return (self._total - step) * self._batch_size / images_per_second if images_per_second > 0 else math.nan


def _labeled(name: str, value: float) -> str:
    return f"{name} {f'{value:.2e}' if name == 'lr' else _figure(value):>{WIDTHS.get(name, WIDTH)}}"


def _figure(value: float) -> str:
    """At most five significant digits, without an exponent from 0.001 to a million: `-18880.1`, `8.8660`."""
    size = abs(value)
    if not math.isfinite(value) or size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{0 if size >= 1e5 else 1 if size >= 1000 else 2 if size >= 100 else 3 if size >= 10 else 4}f}"


def clock_time(seconds: float) -> str:
    """`0:04:01`, `51:07:09`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
