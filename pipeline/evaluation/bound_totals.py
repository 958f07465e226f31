"""Sums of bounds over images on this rank, and the figures of all ranks: means, standard errors, active units."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.data.unreadable import SkippedSample
from pipeline.models.base import LatentGroup
from pipeline.tracking.meters import ActiveUnits, bits_per_dimension


class BatchBounds(NamedTuple):
    """What the figures need of one batch of b images, in nats; float64, so that JSON holds the same numbers."""

    binarization: int
    """Which of several binarizations of the images; 0 is the first."""
    images: Tensor
    """(b, K): elbo and log_px of each image, and its nll if importance samples are taken."""
    groups: Tensor
    """(G + U,) sums over the images: the KL of the G groups, then that of the U channels of all groups."""
    skipped: Sequence[SkippedSample]
    """The samples that could not be read."""

    def as_json(self) -> list[Any]:
        """Lists and numbers."""
        return [self.binarization, self.images.tolist(), self.groups.tolist(), [list(one) for one in self.skipped]]

    @classmethod
    def from_json(cls, value: Any, columns: int, sums: int, device: torch.device | str) -> "BatchBounds":
        """From what `as_json` gave. Raises ValueError for anything else."""
        try:
            binarization, images, groups, skipped = value
            images = torch.tensor(images, dtype=torch.float64, device=device).reshape(len(images), columns)
            groups = torch.tensor(groups, dtype=torch.float64, device=device).reshape(sums)
            samples = [
                SkippedSample(int(position), int(index), "".join(filter(str.isprintable, problem)), None)
                for position, index, problem, _ in skipped
            ]
            return cls(int(binarization), images, groups, samples)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"not the bounds of a batch: {str(error)[:200]}") from None


class BoundTotals:
    """The bounds of this rank's images, added batch by batch."""

    def __init__(self, groups: Sequence[LatentGroup], has_nll: bool, device: torch.device | str, binarizations: int):
        self.groups = groups
        self.names = ("elbo", "log_px", "nll") if has_nll else ("elbo", "log_px")
        self.num_sums = len(groups) + sum(group.shape[0] for group in groups)
        self._images = [
            [torch.zeros(0, len(self.names), dtype=torch.float64, device=device)] for _ in range(binarizations)
        ]
        self._groups = torch.zeros(self.num_sums, dtype=torch.float64, device=device)

    def add(self, bounds: BatchBounds) -> None:
        """Does not synchronize with the device."""
        self._images[bounds.binarization].append(bounds.images)
        self._groups += bounds.groups

    def figures(self, sum_over_ranks: Callable[[Tensor], Tensor], num_dimensions: int) -> dict[str, float]:
        """Over all images of all ranks: means of `elbo`, `log_px`, `kl` and `nll` in nats, and their standard errors
        `elbo_se` and `nll_se`; `bpd`, `bpd_nll` in bits per dimension, with `bpd_se`, `bpd_nll_se`; `kl/GROUP` and
        `active_units/GROUP`. With several binarizations R, an image's value is its mean over them, and
        `elbo_binarization_se` and so on are standard errors of the mean over binarizations. NaN where there is nothing
        to compute a figure from.

        Exact on any number of processes: sums of float64, first of values, then of squared deviations from the mean.
        """
        images = self._by_image()  # (R, n, K)
        runs, rows, columns = images.shape
        local = torch.cat([images.new_full((1,), rows), images.sum(dim=1).flatten(), self._groups])
        count, sums, groups = sum_over_ranks(local).cpu().split([1, runs * columns, self.num_sums])
        means = sums.view(runs, columns) / count
        mean = means.mean(dim=0)  # (K,)
        deviations = images.mean(dim=0) - mean.to(images.device)  # (n, K)
        squares = sum_over_ranks(deviations.square().sum(dim=0)).cpu()
        rows_of_figures = [mean, (squares / (count - 1) / count).sqrt()]
        if runs > 1:
            rows_of_figures.append(means.std(dim=0) / math.sqrt(runs))
        return self._named(torch.stack(rows_of_figures), groups / (count * runs), num_dimensions)

    def _by_image(self) -> Tensor:
        runs = [torch.cat(batches) for batches in self._images]
        if len({len(run) for run in runs}) > 1:
            raise ValueError("samples became readable or unreadable during the evaluation; run it again")
        return torch.stack(runs)

    def _named(self, columns: Tensor, groups: Tensor, num_dimensions: int) -> dict[str, float]:
        """`columns` (2 or 3, K): means, standard errors over images, and those over binarizations."""
        figures, names = {}, [group.name for group in self.groups]
        for ending, row in zip(("", "_se", "_binarization_se"), columns.tolist(), strict=False):
            values = dict(zip(self.names, row, strict=True))
            sign = 1 if ending else -1
            figures |= {f"elbo{ending}": values["elbo"]}
            figures |= {f"bpd{ending}": bits_per_dimension(sign * values["elbo"], num_dimensions)}
            if "nll" in values:
                figures |= {f"nll{ending}": values["nll"]}
                figures |= {f"bpd_nll{ending}": bits_per_dimension(values["nll"], num_dimensions)}
        kl, units = groups[: len(names)], groups[len(names) :]
        figures |= {"log_px": columns[0, 1].item(), "kl": kl.sum().item()}
        figures |= {f"kl/{name}": value for name, value in zip(names, kl.tolist(), strict=True)}
        active = (units > ActiveUnits.THRESHOLD).split([group.shape[0] for group in self.groups])
        return figures | {f"active_units/{name}": float(of.sum()) for name, of in zip(names, active, strict=True)}
