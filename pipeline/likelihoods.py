"""The likelihood p(x | z) as a config section: which distribution, and how many decoder channels it takes."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from pipeline.distributions import (
    Bernoulli,
    BinRule,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    PixelNormal,
)
from pipeline.schema import Section

PixelDistribution = Bernoulli | PixelNormal | DiscretizedLogistic | DiscretizedLogisticMixture


class BernoulliLikelihood(Section):
    """Binary pixels."""

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
    num_components: Annotated[int, Field(ge=1)] = 10
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

    def num_outputs(self, channels: int) -> int:
        """Decoder output channels for images of this many channels."""
        return 2 * channels

    def build(self, outputs: Tensor, bits: int) -> PixelDistribution:
        """p(x | z) from decoder outputs (B, num_outputs, H, W): raw means, then raw log sigmas."""
        return PixelNormal(*outputs.chunk(2, dim=1))


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
    BernoulliLikelihood | LogisticMixtureLikelihood | NormalLikelihood | DiscretizedLogisticLikelihood,
    Field(discriminator="name"),
]
