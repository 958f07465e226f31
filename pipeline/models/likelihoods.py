"""The likelihood p(x | z) as a config section: which distribution, and how many decoder channels it takes."""

from math import log
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.nn.distributions import (
    Bernoulli,
    BinRule,
    ClampedNormal,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Normal,
    PixelNormal,
    SquaredError,
    Squashing,
)
from pipeline.schema import Section

PixelDistribution = Bernoulli | PixelNormal | SquaredError | DiscretizedLogistic | DiscretizedLogisticMixture


class BernoulliLikelihood(Section):
    """Binary pixels; on grey values in [0, 1] the cross-entropy of tutorials."""

    name: Literal["bernoulli"] = "bernoulli"

    def num_outputs(self, channels: int) -> int:
        """Decoder output channels for images of this many channels."""
        return channels

    def build(self, outputs: Tensor, bits: int) -> PixelDistribution:
        """p(x | z) from decoder outputs (B, num_outputs, H, W)."""
        return Bernoulli(outputs)


class LogisticMixtureLikelihood(Section):
    """Discretized mixture of logistics over RGB."""

    name: Literal["logistic_mixture"] = "logistic_mixture"
    num_components: Annotated[int, Field(ge=1, le=2**10)] = 10
    """Logistics per pixel."""
    bin_rule: BinRule = "published"
    """`published` computes bits per dimension as the paper's figures were; `exact` is a normalised distribution."""

    def num_outputs(self, channels: int) -> int:
        """Decoder output channels. Raises ValueError unless the images are RGB."""
        if channels != 3:
            raise ValueError(
                f"likelihood logistic_mixture needs 3 image channels, the data has {channels}; "
                "use bernoulli or discretized_logistic"
            )
        return 10 * self.num_components

    def build(self, outputs: Tensor, bits: int) -> PixelDistribution:
        """p(x | z) from decoder outputs (B, num_outputs, H, W)."""
        return DiscretizedLogisticMixture(outputs, bits, self.bin_rule)


class NormalLikelihood(Section):
    """Continuous density of each pixel value; in bits per dimension not comparable with the discrete likelihoods."""

    name: Literal["normal"] = "normal"
    sigma: Annotated[float, Field(gt=0)] | None = None
    """Of every pixel, on values scaled to [-1, 1]. Unset: learned for each pixel, mean and sigma softly clamped."""

    def num_outputs(self, channels: int) -> int:
        """Decoder output channels for images of this many channels."""
        return channels if self.sigma else 2 * channels

    def build(self, outputs: Tensor, bits: int) -> PixelDistribution:
        """p(x | z) from decoder outputs (B, num_outputs, H, W): means, and raw log sigmas where they are learned."""
        if self.sigma:
            return PixelNormal(Normal(outputs, torch.full_like(outputs, log(self.sigma))))
        return PixelNormal(ClampedNormal(*outputs.chunk(2, dim=1)))


class SquaredErrorLikelihood(Section):
    """Minus the summed squared error, as tutorials train: no normalised density, its bits compare with nothing."""

    name: Literal["squared_error"] = "squared_error"
    output: Squashing = "sigmoid"
    """What bounds the decoder's output: `sigmoid` compares values in [0, 1], `tanh` values scaled to [-1, 1]."""

    def num_outputs(self, channels: int) -> int:
        """Decoder output channels for images of this many channels."""
        return channels

    def build(self, outputs: Tensor, bits: int) -> PixelDistribution:
        """p(x | z) from decoder outputs (B, num_outputs, H, W)."""
        return SquaredError(outputs, self.output)


class DiscretizedLogisticLikelihood(Section):
    """One discretized logistic per channel."""

    name: Literal["discretized_logistic"] = "discretized_logistic"

    def num_outputs(self, channels: int) -> int:
        """Decoder output channels for images of this many channels."""
        return 2 * channels

    def build(self, outputs: Tensor, bits: int) -> PixelDistribution:
        """p(x | z) from decoder outputs (B, num_outputs, H, W): means, then log-scales."""
        return DiscretizedLogistic(*outputs.chunk(2, dim=1), bits)


Likelihood = Annotated[
    BernoulliLikelihood
    | LogisticMixtureLikelihood
    | NormalLikelihood
    | SquaredErrorLikelihood
    | DiscretizedLogisticLikelihood,
    Field(discriminator="name"),
]
