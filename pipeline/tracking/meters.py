"""Running means on the device, active units, throughput and memory."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.distributed.collectives import all_reduce


def bits_per_dimension(nats: float, num_dimensions: int) -> float:
    """Bits per dimension of a negative log-likelihood (or bound) of `nats` per image: nats / (D ln 2)."""
    return nats / (num_dimensions * math.log(2))


class Meter:
    """Means over samples, exact for ragged batches on any number of processes: sums and counts are added, then divided.

    `add` never synchronizes with the device; `reduce` makes one collective call and one device read. Sums are float64.
    `names` are reported even by a process that has no sample of them, because every process must pass the same names
    to `reduce`.
    """

    def __init__(self, device: torch.device | str = "cpu", names: Iterable[str] = ()):
        self.device = torch.device(device)
        self._declared = tuple(names)
        self._sums: dict[tuple[str, ...], Tensor] = {}  # names that are added in one call -> (names,)
        self._counts: dict[tuple[str, ...], Tensor | float] = {}

    def add(self, name: str, value_sum: Tensor | float, count: Tensor | float) -> None:
        """Add the sum of `count` values."""
        self.add_all({name: value_sum}, count)

    def add_all(self, value_sums: Mapping[str, Tensor | float], count: Tensor | float) -> None:
        """Add several sums of `count` values each, with one operation on the device."""
        if not value_sums:
            return
        names = tuple(value_sums)
        sums = self._stack(value_sums.values())  # (names,)
        self._sums[names] = self._sums[names] + sums if names in self._sums else sums
        self._counts[names] = self._counts.get(names, 0.0) + count

    def reduce(self, across_ranks: Callable[[Tensor], Tensor] = all_reduce) -> dict[str, float]:
        """{name: mean over all processes since the last call}, sorted by name; NaN where the count is 0. Resets."""
        names = tuple(dict.fromkeys((*self._declared, *(name for group in self._sums for name in group))))
        if not names:
            return {}
        order = sorted(names)
        totals = torch.zeros(2, len(order), dtype=torch.float64, device=self.device)
        for group, sums in self._sums.items():
            columns = torch.tensor([order.index(name) for name in group], device=self.device)
            totals[0].index_add_(0, columns, sums)
            totals[1].index_add_(0, columns, self._stack([self._counts[group]] * len(group)))
        self._sums, self._counts = {}, {}
        sums, counts = across_ranks(totals).tolist()
        return {
            name: total / count if count else math.nan for name, total, count in zip(order, sums, counts, strict=True)
        }

    def _stack(self, values: Iterable[Tensor | float]) -> Tensor:
        """One float64 vector, made by one kernel if the values are on the device."""
        return torch.stack([self._scalar(value) for value in values]).double()

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self.device).reshape(())
        return torch.tensor(value, dtype=torch.float64, device=self.device)


class ActiveUnits:
    """How many channels of each latent group are in use: those with a mean KL above 0.1 nats.

    The threshold is applied to the mean over an interval and all processes, so the result does not depend on the number
    of processes or the batch size.
    """

    THRESHOLD = 0.1

    def __init__(self, group_names: Iterable[str]):
        self.group_names = tuple(group_names)
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, kl_units: Sequence[Tensor], count: float = 1) -> None:
        """Add the mean KL per channel of a batch, in nats: one tensor (channels,) per group, weighted by `count`.

        Does not synchronize with the device.
        """
        self._sizes = [len(units) for units in kl_units]
        units = torch.cat(list(kl_units)).detach().double() * count
        self._sum = units if self._sum is None else self._sum + units
        self._count += count

    def reduce(self, across_ranks: Callable[[Tensor], Tensor] = all_reduce) -> dict[str, float]:
        """{"active_units/GROUP": number} since the last call; empty if nothing was added.

        Every process must have added something, at least zeros with a count of 0.
        """
        if self._sum is None:
            return {}
        totals = across_ranks(torch.cat([self._sum, self._sum.new_full((1,), self._count)]))  # (units + 1,)
        active = (totals[:-1] / totals[-1] > self.THRESHOLD).split(self._sizes)
        numbers = torch.stack([units.sum() for units in active]).tolist()
        self._sum, self._count = None, 0
        return {f"active_units/{name}": float(number) for name, number in zip(self.group_names, numbers, strict=True)}


class Throughput:
    """Speed of the training loop on this process's clock, in seconds; `clock` is injectable for tests.

    An interval lasts from one report to the next, without pauses. A report inside a pause ends the interval where the
    pause began, and the next interval begins where the pause ends.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds_per_step = math.nan
        self._pause_start: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self._start = self._clock()
        self._waited = self._paused = 0.0
        self._steps = self._images = 0
        if self._pause_start is not None:
            self._pause_start = self._start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Use around the fetch of a batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Use around work that is not training: validation, pictures, checkpoints."""
        self._pause_start = self._clock()
        yield
        self._paused += self._clock() - self._pause_start
        self._pause_start = None

    def count(self, images: int) -> None:
        """Count one optimizer step of `images` images (of all processes)."""
        self._steps += 1
        self._images += images

    def report(self) -> dict[str, float]:
        """Since the last report: images per second, milliseconds per step, share [0, 1] of time waiting for data."""
        end = self._clock() if self._pause_start is None else self._pause_start
        seconds = end - self._start - self._paused
        if not self._steps or seconds <= 0:
            return {}
        self._seconds_per_step = seconds / self._steps
        figures = {
            "perf/images_per_second": self._images / seconds,
            "perf/step_ms": 1000 * self._seconds_per_step,
            "perf/data_wait": self._waited / seconds,
        }
        self.restart()
        return figures

    def seconds_left(self, steps: int) -> float:
        """Estimate for `steps` more steps, from the last report; NaN before the first."""
        return steps * self._seconds_per_step


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of tensors on a CUDA `device` since the last call, in GiB; empty on other devices."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"perf/gpu_memory_gib": peak / 2**30}


def host_memory() -> dict[str, float]:
    """Peak memory of this process so far (resident set), in GiB. A value that rises on and on is a leak."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {"perf/host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


BY_RANK = ("perf/step_ms", "perf/data_wait", "perf/gpu_memory_gib", "perf/host_memory_gib")
"""Figures of one process, which may differ between processes."""


def extremes(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The smallest and the largest of each figure of BY_RANK over all processes: `perf/step_ms_min`, `..._max`.

    `figures`: those of each process. Empty for one process.
    """
    found = {}
    for name in BY_RANK if len(figures) > 1 else ():
        if values := [own[name] for own in figures if name in own]:
            found |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    return found
