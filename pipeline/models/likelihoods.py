"""The likelihood p(x | z) as a config section."""

from math import log
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.nn.distributions import (
    MIN_LOG_SCALE,
    OVERLAPPING,
    Bernoulli,
    BinRule,
    ClampedNormal,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    LogisticScale,
    Normal,
    PixelNormal,
    ScaleRule,
    SquaredError,
    Squashing,
)
from pipeline.schema import Section

PixelDistribution = Bernoulli | PixelNormal | SquaredError | DiscretizedLogistic | DiscretizedLogisticMixture


class BernoulliLikelihood(Section):
    """Binary pixels. For gray values in [0, 1] this is the cross-entropy loss of many tutorials."""

    name: Literal["bernoulli"] = "bernoulli"

    def num_outputs(self, channels: int) -> int:
        """Decoder output channels for images of this many channels."""
        return channels

    def build(self, outputs: Tensor, bits: int) -> PixelDistribution:
        """p(x | z) from decoder outputs (B, num_outputs, H, W)."""
        return Bernoulli(outputs)


class LogisticMixtureLikelihood(Section):
    """Discretized mixture of logistics over RGB pixels."""

    name: Literal["logistic_mixture"] = "logistic_mixture"
    num_components: Annotated[int, Field(ge=1, le=2**10)] = 10
    """Logistics per pixel."""
    bin_rule: BinRule = "published"
    """`published`: as the bits per dimension of NVAE's paper were computed. `exact`: a normalized distribution.
    `vdvae`: as those of VDVAE's paper at 8 bits. `vdvae_overlapping_5_bit`: as those at 5 bits, from images of 8 bits
    (`data.bits=8`); its bins overlap, so the figures are up to 0.5 bits per dimension too good.
    `efficient_vdvae_overlapping_5_bit`: the same with the upper tail, as Efficient-VDVAE has it."""
    scale: ScaleRule = "exp"
    """Scales of the logistics from the decoder's outputs: `exp(scale_beta * output)`, or `softplus` with this beta."""
    scale_beta: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Below 1 the gradients of the scales are smoother. Efficient-VDVAE has 0.6931472 with `softplus`."""
    min_log_scale: Annotated[float, Field(ge=-80, le=0)] = MIN_LOG_SCALE
    """Smallest logarithm of a scale."""

    @property
    def makes_5_bits(self) -> bool:
        """Whether it reduces images of 8 bits to 5 bits itself."""
        return self.bin_rule in OVERLAPPING

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
        scale = LogisticScale(self.scale, self.scale_beta, self.min_log_scale)
        return DiscretizedLogisticMixture(outputs, bits, self.bin_rule, scale)


class NormalLikelihood(Section):
    """Continuous density of pixel values. Its bits per dimension are not comparable with discrete likelihoods."""

    name: Literal["normal"] = "normal"
    sigma: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of every pixel, on values scaled to [-1, 1]. Unset: sigma is learned for each pixel, and mean
    and sigma are softly clamped."""

    def num_outputs(self, channels: int) -> int:
        """Decoder output channels for images of this many channels."""
        return channels if self.sigma else 2 * channels

    def build(self, outputs: Tensor, bits: int) -> PixelDistribution:
        """p(x | z) from decoder outputs (B, num_outputs, H, W): means, then raw log sigmas if they are learned."""
        if self.sigma:
            return PixelNormal(Normal(outputs, torch.full_like(outputs, log(self.sigma))))
        return PixelNormal(ClampedNormal(*outputs.chunk(2, dim=1)))


class SquaredErrorLikelihood(Section):
    """Minus the summed squared error, the loss of many tutorials. Not a normalized density, so its bits per dimension
    are not comparable with any likelihood."""

    name: Literal["squared_error"] = "squared_error"
    output: Squashing = "sigmoid"
    """Activation of the decoder's output. `sigmoid`: error of values in [0, 1]. `tanh`: of values scaled to [-1, 1]."""

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
