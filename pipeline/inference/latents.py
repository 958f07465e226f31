"""Interpolation between latents, and directions in latent space that correspond to an attribute.

Latents are lists with one tensor (B, *group.shape) per group, as `TrainedModel.encode` gives them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Latents = Sequence[Tensor]


def linear(start: Latents, end: Latents, weights: Tensor) -> list[Tensor]:
    """(1 - w) start + w end for latents of one image each: (n, *group.shape) for n weights, of any value."""
    return [(1 - _column(weights, a)) * a + _column(weights, a) * b for a, b in zip(start, end, strict=True)]


def spherical(start: Latents, end: Latents, weights: Tensor) -> list[Tensor]:
    """Along the great circle, group by group, at constant angular speed.

    sin((1 - w) o) / sin(o) start + sin(w o) / sin(o) end, with o the angle between the group's two latents as vectors
    (Shoemake 1985; for latents: White 2016, arXiv:1609.04468). If they are parallel or one is zero, the circle is not
    unique, and the interpolation is linear.
    """
    return [_slerp(a, b, weights) for a, b in zip(start, end, strict=True)]


def _slerp(start: Tensor, end: Tensor, weights: Tensor) -> Tensor:
    a, b = start.flatten().double(), end.flatten().double()
    cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-300)
    if not 1e-6 < cosine.acos() < torch.pi - 1e-6 or not a.norm() or not b.norm():
        return linear([start], [end], weights)[0]
    angle = cosine.acos()
    w = _column(weights, start).double()
    path = (torch.sin((1 - w) * angle) * start + torch.sin(w * angle) * end) / torch.sin(angle)
    return path.to(start.dtype)


def moved(latents: Latents, direction: Latents, strengths: Tensor) -> list[Tensor]:
    """Latents of one image plus each strength times the direction: (n, *group.shape)."""
    return [a + _column(strengths, a) * b for a, b in zip(latents, direction, strict=True)]


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1), with the dtype and device of `like`."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))


class MeanDifference:
    """Mean latents of images with an attribute minus those of images without (Larsen et al. 2016, arXiv:1512.09300).

    Keeps sums, so the memory does not grow with the number of images.
    """

    def __init__(self):
        self._sums: dict[bool, list[Tensor]] = {}
        self.counts = {True: 0, False: 0}

    def add(self, latents: Latents, present: Tensor) -> None:
        """Latents of b images and int (b,): 1 present, 0 absent, anything else is unknown and not counted."""
        for value in (True, False):
            rows = (present == int(value)).to(latents[0].device)
            sums = [group[rows].double().sum(dim=0, keepdim=True) for group in latents]
            before = self._sums.get(value)
            self._sums[value] = sums if before is None else [a + b for a, b in zip(before, sums, strict=True)]
            self.counts[value] += int(rows.sum())

    def direction(self) -> list[Tensor]:
        """(1, *group.shape) float64 each. Raises ValueError unless images with and without were added."""
        if not all(self.counts.values()):
            raise ValueError(
                f"{self.counts[True]} images with the attribute and {self.counts[False]} without; both are needed"
            )
        means = {value: [total / self.counts[value] for total in sums] for value, sums in self._sums.items()}
        return [a - b for a, b in zip(means[True], means[False], strict=True)]


def added(directions: Iterable[tuple[float, Latents]]) -> list[Tensor]:
    """The sum of weighted directions."""
    weighted = [[weight * group for group in direction] for weight, direction in directions]
    return [torch.stack(groups).sum(dim=0) for groups in zip(*weighted, strict=True)]
