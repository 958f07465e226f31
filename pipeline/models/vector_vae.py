"""VAEs with one latent vector and a standard normal prior (Kingma & Welling 2014, arXiv:1312.6114).

A model of this kind says how an image becomes features and how a latent becomes decoder outputs; the rest is here.
Shape legend as in base.py, and L latent units, F features, K columns of the condition.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.models.base import (
    VAE,
    LatentGroup,
    ModelConfig,
    VAEOutput,
    check_condition,
    check_temperature,
    without_border,
)
from pipeline.models.likelihoods import BernoulliLikelihood, Likelihood, PixelDistribution
from pipeline.nn.posterior import Posterior, PosteriorDraw
from pipeline.nn.posterior_flows import Flows
from pipeline.schema import Count

TORCH_MOMENTUM = 0.1
"""Of batch norm's running statistics, as in torch and so in the tutorials."""


class VectorVAEConfig(ModelConfig):
    """What the sections of all models with one latent vector have in common."""

    latent_size: Count = 20
    """Units of the latent vector."""
    flows: Flows | None = None
    """On the posterior's draws: `planar` or `iaf`. With flows the KL is a one-sample estimate."""
    likelihood: Likelihood = BernoulliLikelihood()
    """p(x | z)."""


class VectorVAE(VAE):
    """See the module's docstring. A subclass sets `posterior` and provides `_encode` and `_decode`.

    `border` pixels on every side are padding: the network sees them, the likelihood and `num_dimensions` do not count
    them. `bits`: colour depth, which sets the bins of the discrete likelihoods.
    """

    posterior: Posterior

    def __init__(
        self,
        config: VectorVAEConfig,
        image_shape: tuple[int, int, int],
        border: int = 0,
        bits: int = 8,
        condition_size: int = 0,
    ):
        super().__init__()
        channels, height, width = self.image_shape = tuple(image_shape)
        self.config, self.border, self.bits, self.condition_size = config, border, bits, condition_size
        self.num_dimensions = channels * (height - 2 * border) * (width - 2 * border)
        self.num_outputs = config.likelihood.num_outputs(channels)
        self.groups = (LatentGroup("1x1_group00", (config.latent_size, 1, 1)),)

    # ---- what a subclass provides -----------------------------------------------------------------------------------

    @abstractmethod
    def _encode(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Features (B, F) of images (B, C, H, W) in [0, 1], without any chance."""

    @abstractmethod
    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """Raw decoder outputs (B, num_outputs, H, W), border included, of latents (B, L)."""

    def penalties(
        self, draw: PosteriorDraw, outputs: Tensor, noise: Sequence[Tensor], condition: Tensor | None
    ) -> Mapping[str, Tensor]:
        """What the loss takes beside the bound, (B,) each, weights included: nothing, unless a subclass adds some."""
        return {}

    # ---- the interface of VAE ---------------------------------------------------------------------------------------

    def features(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        check_condition(self, condition)
        return self._encode(x, condition)

    def bound(self, x: Tensor, features: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> VAEOutput:
        draw = self.posterior(features, noise[0].flatten(1))
        outputs = self._decode(draw.z, condition)
        likelihood = self.likelihood(without_border(outputs, self.border))
        return VAEOutput(
            log_px=likelihood.log_prob(without_border(x, self.border)).flatten(1).sum(1),
            kl=draw.kl.sum(1, keepdim=True),
            log_qz=draw.log_qz.sum(1),
            log_pz=draw.log_pz.sum(1),
            kl_units=(draw.kl.mean(0),),
            penalties=self.penalties(draw, outputs, noise, condition),
        )

    def encode(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        """One latent (B, L, 1, 1). Noise of zeros gives the normal's mean, sent through the flows."""
        return [self.posterior(self.features(x, condition), noise[0].flatten(1)).z[:, :, None, None]]

    def decode(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        check_condition(self, condition)
        return self.likelihood(self._decode(latents[0].flatten(1), condition)).mean

    def sample(self, noise: Sequence[Tensor], temperature: float = 1.0, condition: Tensor | None = None) -> Tensor:
        check_temperature(temperature)
        return self.decode([noise[0] * temperature], condition)

    # ---- what lies beneath it ---------------------------------------------------------------------------------------

    def likelihood(self, outputs: Tensor) -> PixelDistribution:
        """p(x | z) from raw decoder outputs, with or without the border."""
        return self.config.likelihood.build(outputs, self.bits)


def joined(values: Tensor, condition: Tensor | None) -> Tensor:
    """(B, n) with the condition (B, K) behind it: (B, n + K)."""
    return values if condition is None else torch.cat([values, condition], dim=1)


def check_divisible(image_shape: tuple[int, int, int], step: int, model: str) -> None:
    """Raises ValueError, naming sizes that work, unless height and width (padding included) are multiples of step."""
    for size in image_shape[1:]:
        if size < step or size % step:
            below = size // step * step
            sizes = " or ".join(str(good) for good in (below, below + step) if good)
            raise ValueError(
                f"{model}: image size {size} is not a multiple of {step}; {sizes} would work: pad with data.pad, or "
                "make the set at another size"
            )
