"""NVAE: a deep hierarchical variational autoencoder (Vahdat & Kautz 2020, arXiv:2007.03898).

The encoder computes one feature map per latent group, from the image's resolution down to the lowest. The decoder
starts from a learned tensor at the lowest resolution and goes through the latent groups in the order of sampling. The
prior of a group is computed from the decoder's state, the posterior from the decoder's state and the group's encoder
feature. The latent, sampled from one of them, is merged into the decoder's state.

Shape legend: base.py. The parts, and how they are put together from the config: nvae_parts.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.models.base import ModelConfig, Temperature, VAEOutput, check_condition, group_temperatures
from pipeline.models.conditions import Condition
from pipeline.models.hierarchical import HierarchicalVAE, LatentTerms, latent_terms
from pipeline.models.likelihoods import Likelihood, LogisticMixtureLikelihood, PixelDistribution
from pipeline.models.nvae_parts import (
    build_decoder,
    build_encoder,
    build_postprocess,
    build_preprocess,
    build_samplers,
    check_image_shape,
    latent_groups,
)
from pipeline.nn.batch_norm import counted_at_the_end
from pipeline.nn.cells import CELLS, ResidualCell
from pipeline.nn.conditioning import Conditioning
from pipeline.nn.distributions import JointClampedNormal, Normal, NormalOfSigma, at_least_float32
from pipeline.nn.flows import FlowPair
from pipeline.nn.layers import WNConv2d
from pipeline.nn.memory_order import is_channels_last, stack_with_format
from pipeline.nn.weight_cache import WeightCache
from pipeline.schema import Count, Layers

Architecture = Literal[tuple(CELLS)]
MAX_CELLS = 5_000  # of all latent groups, flows included


class NVAEConfig(ModelConfig):
    """Architecture of NVAE. The defaults make a small model."""

    supports_regularizers: ClassVar[bool] = True

    name: Literal["nvae"] = "nvae"
    groups_per_scale: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=10, strict=False)] = (6,)
    """Latent groups at each latent resolution, lowest resolution first, which is the order of sampling."""
    encoder_channels: Count = 32
    """Width of the encoder at the image's resolution; it doubles with every halving of the resolution."""
    decoder_channels: Count = 32
    """Width of the decoder at the image's resolution."""
    latent_channels: Count = 20
    """Channels of each latent group."""
    num_blocks: Layers = 1
    """Preprocessing blocks, and as many postprocessing blocks. Each halves (doubles) the resolution between the image
    and the highest latent resolution."""
    num_preprocess_cells: Layers = 2
    """Cells in each preprocessing block; the last one halves the resolution."""
    num_postprocess_cells: Layers = 2
    """Cells in each postprocessing block; the first one doubles the resolution."""
    num_encoder_cells: Layers = 2
    """Encoder cells per latent group."""
    num_decoder_cells: Layers = 2
    """Decoder cells per latent group."""
    num_flows: Annotated[int, Field(ge=0, le=100)] = 0
    """Pairs of autoregressive flow layers on each group's posterior. With flows the KL is a one-sample estimate."""
    squeeze_excitation: bool = True
    """Squeeze-and-excitation at the end of every cell's residual branch."""
    residual_posterior: bool = True
    """Whether the posterior's raw parameters are relative to the prior's."""
    cells: Architecture = "res_mbconv"
    """Cell types of the four parts of the network. `res_mbconv` is the paper's: plain convolutions in the encoder,
    inverted residuals in the decoder."""
    likelihood: Likelihood = LogisticMixtureLikelihood()
    """p(x | z)."""

    @model_validator(mode="after")
    def _check_depth(self) -> Self:
        cells = sum(self.groups_per_scale) * (self.num_encoder_cells + self.num_decoder_cells + self.num_flows)
        if cells > MAX_CELLS:
            raise ValueError(f"model.groups_per_scale: {cells:,} cells and flows in all; at most {MAX_CELLS:,}")
        return self

    def build(
        self, image_shape: tuple[int, int, int], border: int, bits: int, condition: Condition | None = None
    ) -> "NVAE":
        """The model for padded images of this shape. Raises ValueError for a size that it cannot halve as needed."""
        return NVAE(self, image_shape, border, bits, condition.size if condition else 0)

    @property
    def num_halvings(self) -> int:
        """Halvings between the image and the lowest latent resolution."""
        return self.num_blocks + len(self.groups_per_scale) - 1

    @property
    def is_vanilla(self) -> bool:
        """Whether there is a single latent group, which makes a plain VAE without towers."""
        return sum(self.groups_per_scale) == 1


class InferredLatent(NamedTuple):
    """The latent of one group, inferred for a batch: tensors (B, *group.shape)."""

    mean: Tensor
    sigma: Tensor
    """Of the posterior."""
    raw_prior: Tensor
    """With twice the channels: raw means, then raw log sigmas."""
    base: Tensor
    """The posterior's sample before flows, at which its density is evaluated."""
    z: Tensor
    """The latent: `base` after flows."""

    @property
    def posterior(self) -> Normal:
        return NormalOfSigma(self.mean, self.sigma)

    @property
    def prior(self) -> Normal:
        return JointClampedNormal(self.raw_prior)


class NVAE(HierarchicalVAE):
    """The model described at the top of this file.

    `border`: pixels on every side that are padding. They are part of the network's input, but not of the likelihood
    or `num_dimensions`. `bits`: color depth, which sets the bins of the discrete likelihoods. Raises ValueError for
    images that are not square, or whose size is not a multiple of 2^num_halvings.
    """

    def __init__(
        self,
        config: NVAEConfig,
        image_shape: tuple[int, int, int],
        border: int = 0,
        bits: int = 8,
        condition_size: int = 0,
    ):
        super().__init__(image_shape, border, bits, condition_size)
        check_image_shape(config, self.image_shape)
        self.config = config
        self.groups = latent_groups(config, self.image_shape[1])
        self._build(config)

    def _build(self, config: NVAEConfig) -> None:
        # The order of registration is that of the reference release: optimizer state and spectral stacks depend on it.
        channels, size, _ = self.image_shape
        encoder_width, decoder_width = (
            base << config.num_halvings for base in (config.encoder_channels, config.decoder_channels)
        )
        if not config.is_vanilla:
            top = size >> config.num_halvings
            self.start = nn.Parameter(torch.rand(decoder_width, top, top))
        self.stem = WNConv2d(channels, config.encoder_channels, 3, padding=1)
        self.preprocess = build_preprocess(config)
        self.encoder = build_encoder(config)
        self.encoder_top = WNConv2d(encoder_width, encoder_width, 1)
        self.posteriors, self.priors = build_samplers(config)
        self.flows = nn.ModuleList(
            nn.Sequential(*(FlowPair(config.latent_channels) for _ in range(config.num_flows))) for _ in self.groups
        )
        if config.is_vanilla:
            self.decoder_start = WNConv2d(config.latent_channels, decoder_width, 1)
        self.decoder = build_decoder(config)
        self.postprocess = build_postprocess(config)
        num_outputs = config.likelihood.num_outputs(channels)
        self.output = WNConv2d(config.decoder_channels, num_outputs, 3, padding=1)
        if self.condition_size:
            self.conditioning = Conditioning(
                self.condition_size, decoder_width, [config.latent_channels] * len(self.groups)
            )
        self.weight_cache = WeightCache(self)

    # ---- the interface of VAE: each method is one pass, and prepares the weights once -------------------------------

    def forward(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> VAEOutput:
        with self._one_pass():
            return self._bound(x, self._features(x, condition), noise, condition)

    def features(self, x: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        with self._one_pass():
            return self._features(x, condition)

    def bound(
        self, x: Tensor, features: list[Tensor], noise: Sequence[Tensor], condition: Tensor | None = None
    ) -> VAEOutput:
        with self._one_pass():
            return self._bound(x, features, noise, condition)

    def pixel_distribution(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> PixelDistribution:
        check_condition(self, condition)
        with self._one_pass():
            return self.likelihood(self._decode(lambda k, h: latents[k], condition))

    def prior_noise(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        check_condition(self, condition)
        noise = []

        def standardize(k: int, h: Tensor | None) -> Tensor:
            prior = JointClampedNormal(self._raw_prior(k, h, latents[k], condition))
            noise.append((latents[k] - prior.mean) / prior.sigma)
            return latents[k]

        with self._one_pass():
            self._decode(standardize, condition)
        return noise

    def compilable_cells(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, ResidualCell))

    # ---- raw outputs and distributions, for tests and metrics -------------------------------------------------------

    def infer(
        self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None
    ) -> tuple[Tensor, list[InferredLatent]]:
        with self._one_pass():
            return self._infer(self._features(x, condition), noise, condition)

    def generate(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        given: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Flows are not used: they belong to the posteriors."""
        check_condition(self, condition)
        temperatures, latents = group_temperatures(temperature, self.groups), list(given)

        def sample_group(k: int, h: Tensor | None) -> Tensor:
            if k == len(latents):
                prior = JointClampedNormal(self._raw_prior(k, h, noise[k], condition), temperatures[k])
                latents.append(prior.sample(noise[k]))
            return latents[k]

        with self._one_pass():
            return self._decode(sample_group, condition), latents

    # ---- the parts; their callers have entered _one_pass -----------------------------------------------------

    @contextmanager
    def _one_pass(self) -> Iterator[None]:
        with self.weight_cache.prepared(), counted_at_the_end():
            yield

    def _features(self, x: Tensor, condition: Tensor | None) -> list[Tensor]:
        """One encoder feature (B, width, H_k, W_k) per group, in the order of sampling."""
        check_condition(self, condition)
        h = self.preprocess(self.stem(2 * x - 1))
        features = []
        for step in self.encoder:
            h = step.cells(h)
            features.append(h)
        features[-1:] = [F.elu(self.encoder_top(F.elu(h)))]
        return features[::-1]

    def _bound(self, x: Tensor, features: list[Tensor], noise: Sequence[Tensor], condition: Tensor | None) -> VAEOutput:
        return self._vae_output(x, *self._infer(features, noise, condition))

    def _terms(self, latents: Sequence[InferredLatent]) -> LatentTerms:
        *others, z = zip(*latents, strict=True)
        mean, sigma, raw_prior, base = (stack_with_format(tensors, like=z[-1]) for tensors in others)
        posterior, prior = NormalOfSigma(mean, sigma), JointClampedNormal(raw_prior)
        if not self.config.num_flows:
            return latent_terms(posterior, prior, base)
        return latent_terms(posterior, prior, stack_with_format(z, like=z[-1]), before_flows=base)

    def _infer(
        self, features: list[Tensor], noise: Sequence[Tensor], condition: Tensor | None
    ) -> tuple[Tensor, list[InferredLatent]]:
        latents: list[InferredLatent] = []

        def infer_group(k: int, h: Tensor | None) -> Tensor:
            latents.append(self._infer_group(k, features[k], h, noise[k], condition))
            return latents[-1].z

        return self._decode(infer_group, condition), latents

    def _decode(self, latent: Callable[[int, Tensor | None], Tensor], condition: Tensor | None) -> Tensor:
        """Raw outputs, where `latent(k, h)` returns the latent of group k for decoder state h. Group 0 has no state."""
        z = latent(0, None)
        h = self._top_state(z, condition)  # (B, width, top, top)
        for k in range(1, len(self.groups)):
            h = self.decoder[k].cells(h)  # (B, width, H_k, W_k)
            z = latent(k, h)
            h = self.decoder[k].combine(torch.cat([h, z.to(h.dtype)], dim=1))
        return self.output(F.elu(self.postprocess(h)))

    def _top_state(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """The decoder's state (B, width, top, top) after the first latent, merged with the learned start if any."""
        offset = 0 if condition is None else self.conditioning.start(condition)[:, :, None, None]
        if self.config.is_vanilla:
            return self.decoder_start(z) + offset
        start = self.start.expand(z.shape[0], -1, -1, -1) + offset
        merged = torch.cat([start, z.to(start.dtype)], dim=1)  # (B, width + latent_channels, top, top)
        return self.decoder[0].combine(merged.contiguous(memory_format=self._memory_format(z)))

    def _infer_group(
        self, k: int, feature: Tensor, h: Tensor | None, noise: Tensor, condition: Tensor | None
    ) -> InferredLatent:
        raw_prior = self._raw_prior(k, h, noise, condition)
        if k > 0:
            feature = feature + self.encoder[-1 - k].combine(h)
        raw_posterior = self.posteriors[k](feature)  # (B, 2 latent_channels, H_k, W_k)
        if k > 0 and self.config.residual_posterior:
            raw_posterior = raw_posterior + raw_prior  # in float32 or better, as is all that follows
        posterior = JointClampedNormal(raw_posterior)
        base = posterior.sample(noise)
        return InferredLatent(posterior.mean, posterior.sigma, raw_prior, base, self.flows[k](base))

    def _raw_prior(self, k: int, h: Tensor | None, noise: Tensor, condition: Tensor | None) -> Tensor:
        """Raw parameters of the prior (B, 2 latent_channels, H_k, W_k), in float32 or better."""
        if k > 0:
            raw = self.priors[k - 1](F.elu(h))
        else:
            raw = torch.zeros_like(noise, dtype=self.stem.weight.dtype).repeat(1, 2, 1, 1)
        if condition is not None:
            raw = raw + self.conditioning.priors[k](condition)[:, :, None, None]
        return at_least_float32(raw)

    def _memory_format(self, like: Tensor) -> torch.memory_format:
        """channels_last if the first latent or the weights are in it."""
        weight = self.output.weight
        last = any(is_channels_last(tensor) for tensor in (like, weight))
        return torch.channels_last if last else torch.contiguous_format
