"""The Frechet distance of two normal distributions, the FID where they are fitted to Inception features."""

import torch
from torch import Tensor

from pipeline.evaluation.feature_moments import Moments

RANK_TOLERANCE = 2.0**-52


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, "GANs trained by a two time-scale update rule",
    eq. 6); Frechet's distance itself is its root.

    With S1 = A A^T and S2 = B B^T, from eigenvalues of symmetric matrices, the last trace is the sum of the singular
    values of A^T B: their squares are the eigenvalues of S1^(1/2) S2 S1^(1/2). Rank-deficient covariances are allowed.
    (The root of a matrix that is not symmetric, as other programs use it, is inexact or fails for those; the
    eigenvalues of S1^(1/2) S2 S1^(1/2) would lose half of the digits.)
    """
    overlap = torch.linalg.svdvals(factor(first.covariance).T @ factor(second.covariance)).sum()
    spread = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + spread - 2 * overlap
    return max(0.0, distance.item())


def factor(covariance: Tensor) -> Tensor:
    """A (d, r) with A A^T = `covariance` (d, d), which is symmetric and has rank r up to rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > RANK_TOLERANCE * len(values) * values.max()
    return vectors[:, kept] * values[kept].sqrt()
