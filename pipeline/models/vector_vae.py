"""VAEs with one latent vector and a standard normal prior (Kingma & Welling 2014, arXiv:1312.6114).

A subclass defines the encoder, from image to features, and the decoder, from latent to raw outputs. The posterior, the
bound and sampling are here. Shape legend: base.py, and L latent units, F features, K columns of the condition.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.models.base import (
    VAE,
    LatentGroup,
    ModelConfig,
    Temperature,
    VAEOutput,
    check_condition,
    group_temperatures,
)
from pipeline.models.likelihoods import BernoulliLikelihood, Likelihood, PixelDistribution
from pipeline.nn.posterior import Posterior, PosteriorSample
from pipeline.nn.posterior_flows import Flows
from pipeline.schema import Count

TORCH_MOMENTUM = 0.1
"""Momentum of batch norm's running statistics: torch's default, which the tutorials use."""


class VectorVAEConfig(ModelConfig):
    """The settings that all models with one latent vector have in common."""

    latent_size: Count = 20
    """Units of the latent vector."""
    flows: Flows | None = None
    """Normalizing flows on the posterior's samples: `planar` or `iaf`. With flows the KL is a one-sample estimate."""
    likelihood: Likelihood = BernoulliLikelihood()
    """p(x | z)."""


class VectorVAE(VAE):
    """A VAE with one latent vector. A subclass sets `posterior` and implements `_encode` and `_decode`."""

    posterior: Posterior

    def __init__(
        self,
        config: VectorVAEConfig,
        image_shape: tuple[int, int, int],
        border: int = 0,
        bits: int = 8,
        condition_size: int = 0,
    ):
        super().__init__(image_shape, border, bits, condition_size)
        self.config = config
        self.num_outputs = config.likelihood.num_outputs(self.image_shape[0])
        self.groups = (LatentGroup("1x1_group00", (config.latent_size, 1, 1)),)

    # ---- what a subclass implements ----------------------------------------------------------------------------------

    @abstractmethod
    def _encode(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Features (B, F) of images (B, C, H, W) in [0, 1]. Deterministic."""

    @abstractmethod
    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """Raw decoder outputs (B, num_outputs, H, W), border included, for latents (B, L)."""

    def _decode_with_penalties(
        self, latent: PosteriorSample, noise: Sequence[Tensor], condition: Tensor | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Raw decoder outputs (B, num_outputs, H, W) of a posterior sample, and the terms that the loss adds to the
        bound: (B,) each, already multiplied by their weights.
        """
        return self._decode(latent.z, condition), {}

    # ---- the interface of VAE ---------------------------------------------------------------------------------------

    def features(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        check_condition(self, condition)
        return self._encode(x, condition)

    def bound(self, x: Tensor, features: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> VAEOutput:
        latent = self.posterior(features, noise[0].flatten(1))
        outputs, penalties = self._decode_with_penalties(latent, noise, condition)
        return VAEOutput(
            log_px=self._log_px(x, outputs),
            kl=latent.kl.sum(1, keepdim=True),
            log_qz=latent.log_qz.sum(1),
            log_pz=latent.log_pz.sum(1),
            kl_units=(latent.kl.mean(0),),
            penalties=penalties,
        )

    def encode(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        """One latent (B, L, 1, 1). Noise of zeros gives the mean of the normal, passed through the flows."""
        return [self.posterior(self.features(x, condition), noise[0].flatten(1)).z[:, :, None, None]]

    def pixel_distribution(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> PixelDistribution:
        check_condition(self, condition)
        return self.likelihood(self._decode(latents[0].flatten(1), condition))

    def sample_with_latents(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        given: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        (scale,) = group_temperatures(temperature, self.groups)
        latents = list(given) or [noise[0] * scale]
        return self.decode(latents, condition), latents

    def prior_noise(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        """The latent itself: its prior is the standard normal."""
        check_condition(self, condition)
        return list(latents)


def concatenated(values: Tensor, condition: Tensor | None) -> Tensor:
    """values (B, n) and the condition (B, K) concatenated: (B, n + K)."""
    return values if condition is None else torch.cat([values, condition], dim=1)
