"""Precision and recall of samples (Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing
generative models", section 2)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

ROWS, COLUMNS = 1000, 10000
"""Size of a block of distances, 80 MB: memory does not grow with the number of features."""
ROUNDING = 1e-12
"""Squared distances below this part of the squared lengths are rounding errors of equal features."""

Share = Callable[[int], Iterable[int]]
Total = Callable[[Tensor], Tensor]


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, share: Share = range, total: Total = lambda values: values
) -> dict[str, float]:
    """`precision`: the share of fake features (m, d) that lie within the distance of a real feature to its k-th nearest
    other real feature. `recall`: the share of real ones (n, d) within that distance of a fake one.

    A rank computes the blocks of rows `share(number of blocks)`, and `total` sums a tensor over ranks: the figures are
    equal on any number of ranks. Raises ValueError for k features or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"the {k}-th nearest needs more than {k} features; there are {len(real)} and {len(fake)}")
    real_radii, fake_radii = (neighbor_radii(features, k, share, total) for features in (real, fake))
    precision = covered_share(fake, real, real_radii, share, total)
    return {"precision": precision, "recall": covered_share(real, fake, fake_radii, share, total)}


def neighbor_radii(features: Tensor, k: int, share: Share, total: Total) -> Tensor:
    """(n,) float64: squared distance of each feature to its k-th nearest other one."""
    radii = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    for rows, here in shared_blocks(features, share):
        nearest = torch.empty(len(rows), 0, dtype=torch.float64, device=features.device)
        for columns in features.split(COLUMNS):
            candidates = torch.cat([nearest, squared_distances(rows, columns)], dim=1)
            nearest = candidates.topk(min(k + 1, candidates.shape[1]), largest=False).values  # each one itself as well
        radii[here] = nearest.amax(1)
    return total(radii)


def covered_share(points: Tensor, centers: Tensor, radii: Tensor, share: Share, total: Total) -> float:
    """The share of points within the (squared) radius of at least one center."""
    covered = torch.zeros((), dtype=torch.float64, device=points.device)
    for rows, _ in shared_blocks(points, share):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for columns, around in zip(centers.split(COLUMNS), radii.split(COLUMNS), strict=True):
            inside |= (squared_distances(rows, columns) <= around).any(1)
        covered += inside.sum()
    return total(covered).item() / len(points)


def shared_blocks(features: Tensor, share: Share) -> Iterable[tuple[Tensor, slice]]:
    """This rank's blocks of rows, and where they are."""
    for number in share(-(-len(features) // ROWS)):
        here = slice(number * ROWS, (number + 1) * ROWS)
        yield features[here], here


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) float64 for x (n, d) and y (m, d)."""
    x, y = x.double(), y.double()
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)  # (n, m)
    squares = torch.addmm(lengths, x, y.T, alpha=-2)
    return squares.masked_fill(squares < ROUNDING * lengths, 0)
