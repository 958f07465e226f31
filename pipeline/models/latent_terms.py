"""The terms of the bound that belong to the latents of a hierarchical model, computed for all groups of one shape at
once: their densities then take as many kernels as those of one group.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.base import LatentGroup, VAEOutput
from pipeline.nn.distributions import Normal


class LatentTerms(NamedTuple):
    """Terms of n groups of one shape, in nats."""

    log_q: Tensor
    log_p: Tensor
    """(B,) each: summed over the groups."""
    kl: Tensor
    """(n, B, channels): summed over space."""


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
