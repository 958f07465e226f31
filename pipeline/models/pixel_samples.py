"""Images sampled from p(x | z), pixel by pixel, as a function of (seed, position).

B images, C channels, H x W pixels, K components of a mixture.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.models.base import LatentGroup
from pipeline.models.likelihoods import PixelDistribution
from pipeline.models.noise import draw_noise
from pipeline.nn.distributions import Bernoulli, DiscretizedLogistic, DiscretizedLogisticMixture, PixelNormal


def sample_pixels(distribution: PixelDistribution, seed: int, positions: Sequence[int]) -> Tensor:
    """Images (B, C, H, W) in [0, 1], not rounded to gray levels, for the samples at `positions`.

    Raises ValueError for a likelihood that is not a probability distribution (squared_error).
    """
    match distribution:
        case PixelNormal():
            (noise,) = _noise(seed, positions, distribution.normal.mean)
            return distribution.sample(noise)
        case Bernoulli():
            return distribution.sample(_uniform(seed, positions, distribution.logits)[0])
        case DiscretizedLogistic():
            return distribution.sample(_uniform(seed, positions, distribution.location)[0])
        case DiscretizedLogisticMixture():
            logits = distribution.mixture_logits.permute(0, 3, 1, 2)  # (B, K, H, W)
            means = distribution.means[..., 0].permute(0, 3, 1, 2)  # (B, 3, H, W)
            return distribution.sample(*_uniform(seed, positions, logits, means))
    raise ValueError("likelihood squared_error is not a probability distribution, so it has no samples; use its mean")


def _noise(seed: int, positions: Sequence[int], *like: Tensor) -> list[Tensor]:
    """Standard normal noise of the shapes of these tensors (B, ...)."""
    groups = [LatentGroup("", tuple(tensor.shape[1:])) for tensor in like]
    return draw_noise(groups, seed, "pixels", positions, like[0].device, like[0].dtype)


def _uniform(seed: int, positions: Sequence[int], *like: Tensor) -> list[Tensor]:
    """Uniform noise in (0, 1) in float64, in which neither end is reached."""
    return [torch.special.ndtr(noise.double()) for noise in _noise(seed, positions, *like)]
