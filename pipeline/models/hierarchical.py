"""What VAEs with several latent groups have in common, and the terms of their bound that belong to the latents.

The terms are computed for all groups of one shape at once: their densities then take as many kernels as those of one
group. Shape legend: base.py.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.models.base import VAE, LatentGroup, Temperature, VAEOutput
from pipeline.nn.distributions import Normal


class LatentTerms(NamedTuple):
    """Terms of n groups of one shape, in nats."""

    log_q: Tensor
    log_p: Tensor
    """(B,) each: summed over the groups."""
    kl: Tensor
    """(n, B, channels): summed over space."""


class HierarchicalVAE(VAE):
    """A VAE that infers or samples one latent group after the other. A subclass implements `infer`, `generate` and
    `_terms`.
    """

    @abstractmethod
    def infer(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> tuple[Tensor, list[Any]]:
        """Raw decoder outputs (B, C_out, H, W) and each group's latent, for images x (B, C, H, W) in [0, 1].

        A latent has `z` (B, *group.shape), and what `_terms` needs.
        """

    @abstractmethod
    def generate(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        given: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Raw decoder outputs (B, C_out, H, W), and the latents, as `sample_with_latents` describes them."""

    @abstractmethod
    def _terms(self, latents: Sequence[Any]) -> LatentTerms:
        """Of inferred groups of one shape."""

    def encode(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        _, latents = self.infer(x, noise, condition)
        return [latent.z for latent in latents]

    def sample_with_latents(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        given: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        outputs, latents = self.generate(noise, temperature, condition, given)
        return self.likelihood(outputs).mean, latents

    def _vae_output(self, x: Tensor, outputs: Tensor, latents: Sequence[Any]) -> VAEOutput:
        """The bound of images x, from what `infer` returns."""
        log_px = self._log_px(x, outputs)
        return vae_output(log_px, [self._terms(latents[run]) for run in runs_of_one_shape(self.groups)])


def latent_terms(posterior: Normal, prior: Normal, z: Tensor, before_flows: Tensor | None = None) -> LatentTerms:
    """Of latents z (n, B, C, H, W), sampled from the posterior, with analytic KL.

    `before_flows`: the posterior's sample, where z are these values after flows. The KL is then that of the sample.
    """
    log_q = posterior.log_prob(z if before_flows is None else before_flows)
    log_p = prior.log_prob(z)
    kl = posterior.kl(prior) if before_flows is None else log_q - log_p
    return LatentTerms(log_q.sum((0, 2, 3, 4)), log_p.sum((0, 2, 3, 4)), kl.sum((3, 4)))


def runs_of_one_shape(groups: Sequence[LatentGroup]) -> Iterator[slice]:
    """Consecutive groups of equal shape."""
    start = 0
    for _, run in groupby(groups, key=lambda group: group.shape):
        end = start + len(list(run))
        yield slice(start, end)
        start = end


def vae_output(log_px: Tensor, terms: Sequence[LatentTerms]) -> VAEOutput:
    """The bound of log p(x | z), (B,), and the terms of all groups, in their order."""
    log_q, log_p, kl = zip(*terms, strict=True)
    return VAEOutput(
        log_px=log_px,
        kl=torch.cat([of_shape.sum(2) for of_shape in kl]).t(),
        log_qz=torch.stack(log_q).sum(0),
        log_pz=torch.stack(log_p).sum(0),
        kl_units=tuple(units for of_shape in kl for units in of_shape.mean(1).unbind(0)),
    )
