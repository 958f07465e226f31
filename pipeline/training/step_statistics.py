"""Statistics of training steps, which count only if the step is finite."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.tracking.meters import ActiveUnits, Meter


class StepStatistics:
    """Means over an interval of steps. The statistics of a step count after `commit`, and are dropped by `discard`."""

    def __init__(self, device: torch.device, group_names: Iterable[str]):
        self._meter = Meter(device)
        self._active_units = ActiveUnits(group_names)
        self.discard()

    def add(self, statistics: Mapping[str, Tensor]) -> None:
        """Scalars of one forward pass or of the step; names without a slash belong to `train/`."""
        self._scalars.append({name if "/" in name else f"train/{name}": value for name, value in statistics.items()})

    def add_kl_units(self, kl_units: Sequence[Tensor]) -> None:
        """`VAEOutput.kl_units` of one forward pass."""
        self._kl_units.append([units.detach() for units in kl_units])  # detached, so that the graph is freed

    def commit(self) -> None:
        """The step was finite: its statistics enter the means."""
        joined: list[dict[str, Tensor]] = []  # scalars of different names take one operation
        for scalars in self._scalars:
            if joined and not joined[-1].keys() & scalars.keys():
                joined[-1] |= scalars
            else:
                joined.append(scalars)
        for scalars in joined:
            self._meter.add_all(scalars, 1)
        for kl_units in self._kl_units:
            self._active_units.add(kl_units)
        self.discard()

    def discard(self) -> None:
        """Drops the statistics of the current step."""
        self._scalars: list[dict[str, Tensor]] = []
        self._kl_units: list[list[Tensor]] = []

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the steps since the last call and over all ranks, and `active_units/GROUP`."""
        return self._meter.reduce(sum_over_ranks) | self._active_units.reduce(sum_over_ranks)
