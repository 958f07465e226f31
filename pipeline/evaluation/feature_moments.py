"""Mean and covariance of features, from sums that ranks can add up."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Of features of d dimensions, in float64 on the CPU."""

    count: int
    mean: Tensor
    """(d,)."""
    covariance: Tensor
    """(d, d), with divisor count - 1."""


class FeatureMoments:
    """Sums of features and of their products in float64: one matrix, so that ranks need one reduction.

    The sums of several ranks differ from those of one by the order of addition alone, about 1e-15 of their size.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        """`size`: dimensions d of the features."""
        self._sums = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)  # of (1, f) (1, f)^T

    def add(self, features: Tensor) -> None:
        """Of features (b, d)."""
        features = features.to(self._sums)
        rows = torch.cat([features.new_ones(len(features), 1), features], dim=1)  # (b, 1 + d)
        self._sums.addmm_(rows.T, rows)

    def reduce(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Moments:
        """The moments of what all ranks added; `total` sums a tensor over ranks. Raises ValueError for features that
        are not finite, and for fewer than two.
        """
        sums = total(self._sums).cpu()
        if not bool(torch.isfinite(sums).all()):
            raise ValueError("some features are not finite: the model's samples hold NaN or infinite values")
        count = round(sums[0, 0].item())
        if count < 2:
            raise ValueError(f"a covariance takes at least 2 images; there are {count}")
        mean = sums[0, 1:] / count
        centered = sums[1:, 1:] - count * torch.outer(mean, mean)
        return Moments(count, mean, centered / (count - 1))
