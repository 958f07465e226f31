"""The approximate posterior of a model with one latent vector: a diagonal normal, optionally followed by flows."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.nn.distributions import Normal
from pipeline.nn.posterior_flows import Flows


class PosteriorSample(NamedTuple):
    """One sample for each of B images. Tensors are (B, L); densities are in nats."""

    normal: Normal
    """The posterior before flows."""
    z: Tensor
    """The latent, after flows."""
    log_qz: Tensor
    """log q(z | x) of each unit. If flows mix the units, only the sum over them is meaningful."""
    log_pz: Tensor
    """log p(z) of each unit."""
    kl: Tensor
    """KL of each unit: analytic, or log q - log p of this sample if there are flows."""


class Posterior(nn.Module):
    """q(z | x) from an encoder's features (B, F). The prior of every unit is N(0, 1).

    As in Kingma & Welling 2014 (appendix C.2): one linear layer gives mu, another log sigma^2. Both are unbounded.
    """

    def __init__(self, num_features: int, latent_size: int, flows: Flows | None = None):
        super().__init__()
        self.mean = nn.Linear(num_features, latent_size)
        self.log_variance = nn.Linear(num_features, latent_size)
        self.flows = nn.ModuleList() if flows is None else flows.build(latent_size, num_features)

    def normal(self, features: Tensor) -> Normal:
        """The posterior before flows."""
        return Normal(self.mean(features), self.log_variance(features) / 2)

    def forward(self, features: Tensor, noise: Tensor) -> PosteriorSample:
        """A sample from features (B, F) and standard normal noise (B, L)."""
        normal = self.normal(features)
        base = normal.sample(noise)
        z, log_det = self._flow(base, features)
        prior = Normal.standard(z)
        log_qz, log_pz = normal.log_prob(base) - log_det, prior.log_prob(z)
        kl = log_qz - log_pz if len(self.flows) else normal.kl(prior)
        return PosteriorSample(normal, z, log_qz, log_pz, kl)

    def _flow(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(z)
        for flow in self.flows:
            z, log_det = flow(z, features)
            total = total + log_det
        return z, total
