"""Hierarchical VAEs whose decoder is a sequence of blocks with one latent group each, as VDVAE and Efficient-VDVAE.

A block gets the decoder's state and computes the group's prior from it, and its posterior from the state and a feature
of the encoder. The latent is added to the state.

Shape legend: base.py; W is the width of a block, R its resolution.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.base import LatentGroup, Temperature, VAEOutput, check_condition, group_temperatures
from pipeline.models.hierarchical import HierarchicalVAE, LatentTerms, latent_terms
from pipeline.models.likelihoods import PixelDistribution
from pipeline.nn.conditioning import Conditioning
from pipeline.nn.distributions import at_least_float32
from pipeline.nn.latent_normals import LatentNormals
from pipeline.nn.memory_order import stack_with_format


class TopDownBlock(nn.Module, ABC):
    """One latent group: prior and posterior from the decoder's state, the latent merged into it.

    The posterior gets the state as it was before the prior's network added to it. A subclass has the modules
    `posterior`, `project` and `residual`, and implements `prior_outputs`.
    """

    posterior: nn.Module
    """State and feature, concatenated, to raw parameters (B, 2C, R, R)."""
    project: nn.Module
    """Latent (B, C, R, R) to (B, W, R, R)."""
    residual: nn.Module
    """Applied to the state last."""

    def __init__(self, normals: LatentNormals):
        super().__init__()
        self.normals = normals

    @abstractmethod
    def prior_outputs(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """From state h, the raw parameters of the prior (B, 2C, R, R) and what is added to the state (B, W, R, R)."""

    def forward(
        self, h: Tensor, feature: Tensor, noise: Tensor, embedding: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The new state; the raw parameters of posterior and prior, (B, 2C, R, R) each; a sample of the posterior."""
        raw_prior, state = self.split_prior(h, embedding)
        raw_posterior = at_least_float32(self.posterior(torch.cat([h, feature], dim=1)))
        z = self.normals.posterior(raw_posterior, raw_prior).sample(noise)
        return self.merge(state, z), raw_posterior, raw_prior, z

    def split_prior(self, h: Tensor, embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The raw parameters of the prior, and the state with what the prior's network adds to it.

        `embedding`: of the condition, (B, 2C), added to the parameters.
        """
        raw, extra = self.prior_outputs(h)
        raw = raw if embedding is None else raw + embedding[:, :, None, None]
        return at_least_float32(raw), h + extra

    def merge(self, state: Tensor, z: Tensor) -> Tensor:
        """The new state (B, W, R, R)."""
        return self.residual(state + self.project(z.to(state.dtype)))


class TopDownDecoder(nn.Module, ABC):
    """The blocks and what is between them."""

    blocks: nn.ModuleList
    """Of `TopDownBlock`, in the order of sampling."""
    feature_keys: Sequence[int]
    """Of each block: the key of its feature among those of the encoder."""

    @abstractmethod
    def forward(self, step: Callable[[int, Tensor], Tensor], batch_size: int, offset: Tensor | None = None) -> Tensor:
        """Raw outputs (B, C_out, H, W), where `step(k, h)` applies block k to state h and returns the new state.

        `offset`: of the first block's state, (B, W), from the condition.
        """


class InferredLatent(NamedTuple):
    """The latent of one group, inferred for a batch, or those of n groups of one shape, (n, B, ...)."""

    raw_posterior: Tensor
    raw_prior: Tensor
    """(B, 2C, R, R) each, in float32 or better."""
    z: Tensor
    """(B, C, R, R)."""


class TopDownVAE(HierarchicalVAE):
    """The interface of `VAE` for an encoder and a decoder of this kind.

    A subclass sets, at its end of construction, `groups`, `encoder`, `decoder` and `normals`, and implements
    `network_input`. It calls `add_conditioning` last.
    """

    encoder: nn.Module
    """Network inputs to a dict or list of features."""
    decoder: TopDownDecoder
    normals: LatentNormals

    @abstractmethod
    def network_input(self, x: Tensor) -> Tensor:
        """What the encoder gets for images x (B, C, H, W) in [0, 1]."""

    def add_conditioning(self, start_width: int) -> None:
        """Embeddings of the condition, for a conditional model. `start_width`: channels of the first block's state."""
        if self.condition_size:
            channels = [group.shape[0] for group in self.groups]
            self.conditioning = Conditioning(self.condition_size, start_width, channels)

    # ---- the interface of VAE ---------------------------------------------------------------------------------------

    def features(self, x: Tensor, condition: Tensor | None = None) -> Any:
        check_condition(self, condition)
        return self.encoder(self.network_input(x))

    def bound(self, x: Tensor, features: Any, noise: Sequence[Tensor], condition: Tensor | None = None) -> VAEOutput:
        return self._vae_output(x, *self._infer(features, noise, condition))

    def pixel_distribution(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> PixelDistribution:
        return self.likelihood(self._decode(lambda k, raw_prior: latents[k], latents[0].shape[0], condition))

    def prior_noise(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        noise = []

        def standardize(k: int, raw_prior: Tensor) -> Tensor:
            prior = self.normals.prior(raw_prior)
            noise.append((latents[k] - prior.mean) / prior.sigma)
            return latents[k]

        self._decode(standardize, latents[0].shape[0], condition)
        return noise

    def compilable_cells(self) -> Iterator[nn.Module]:
        yield from self.encoder.blocks
        yield from self.decoder.blocks

    # ---- raw outputs and distributions, for tests and metrics -------------------------------------------------------

    def infer(
        self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None
    ) -> tuple[Tensor, list[InferredLatent]]:
        return self._infer(self.features(x, condition), noise, condition)

    def generate(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        given: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        temperatures, latents = group_temperatures(temperature, self.groups), list(given)

        def sample_group(k: int, raw_prior: Tensor) -> Tensor:
            if k == len(latents):
                latents.append(self.normals.prior(raw_prior).sample(temperatures[k] * noise[k]))
            return latents[k]

        return self._decode(sample_group, (given[0] if given else noise[0]).shape[0], condition), latents

    # ---- the two ways through the decoder ---------------------------------------------------------------------------

    def _infer(
        self, features: Any, noise: Sequence[Tensor], condition: Tensor | None
    ) -> tuple[Tensor, list[InferredLatent]]:
        start, priors = self._embeddings(condition)
        latents: list[InferredLatent] = []

        def infer_group(k: int, h: Tensor) -> Tensor:
            feature = features[self.decoder.feature_keys[k]]
            state, *latent = self.decoder.blocks[k](h, feature, noise[k], priors[k])
            latents.append(InferredLatent(*latent))
            return state

        return self.decoder(infer_group, noise[0].shape[0], start), latents

    def _decode(self, latent: Callable[[int, Tensor], Tensor], batch_size: int, condition: Tensor | None) -> Tensor:
        """Raw outputs, where `latent(k, raw_prior)` returns the latent of group k."""
        start, priors = self._embeddings(condition)

        def generate_group(k: int, h: Tensor) -> Tensor:
            block = self.decoder.blocks[k]
            raw_prior, state = block.split_prior(h, priors[k])
            return block.merge(state, latent(k, raw_prior))

        return self.decoder(generate_group, batch_size, start)

    def _embeddings(self, condition: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
        """Of a condition, for the decoder's start and for the prior of each group; None without one."""
        check_condition(self, condition)
        if condition is None:
            return None, [None] * len(self.groups)
        return self.conditioning.start(condition), [embed(condition) for embed in self.conditioning.priors]

    def _terms(self, latents: Sequence[InferredLatent]) -> LatentTerms:
        stacks = (stack_with_format(tensors, like=latents[-1].z) for tensors in zip(*latents, strict=True))
        raw_posterior, raw_prior, z = stacks
        return latent_terms(self.normals.posterior(raw_posterior, raw_prior), self.normals.prior(raw_prior), z)


def named_groups(shapes: Iterable[tuple[int, int, int]]) -> tuple[LatentGroup, ...]:
    """Latent groups of these shapes (C, R, R), numbered within their resolution."""
    counts: Counter[int] = Counter()
    groups = []
    for channels, r, _ in shapes:
        groups.append(LatentGroup(f"{r}x{r}_group{counts[r]:02d}", (channels, r, r)))
        counts[r] += 1
    return tuple(groups)
