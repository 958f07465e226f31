"""VDVAE: a very deep hierarchical VAE (Child 2020, arXiv:2011.10650).

The encoder keeps the last feature map of each resolution. The decoder has a state for each resolution. Every block of
it has one latent group: the prior is computed from the state, the posterior from the state and the feature of its
resolution, and the latent is added to the state. There is no normalization, and no bound on means and sigmas.

Shape legend: base.py. Encoder and decoder: vdvae_parts.py. The strings that describe them: vdvae_options.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.models.base import (
    VAE,
    LatentGroup,
    ModelConfig,
    Temperature,
    VAEOutput,
    check_condition,
    group_temperatures,
    without_border,
)
from pipeline.models.conditions import Condition
from pipeline.models.latent_terms import LatentTerms, latent_terms, runs_of_one_shape, vae_output
from pipeline.models.likelihoods import Likelihood, LogisticMixtureLikelihood, PixelDistribution
from pipeline.models.vdvae_options import VDVAEOptions, parse_options
from pipeline.models.vdvae_parts import Decoder, Encoder, EncoderBlock, TopDownBlock, normal
from pipeline.nn.conditioning import Conditioning
from pipeline.nn.memory_order import stack_with_format
from pipeline.schema import Count

Blocks = Annotated[str, Field(min_length=1, max_length=10_000)]


class VDVAEConfig(ModelConfig):
    """Architecture of VDVAE. The defaults make a small model for images of 32x32 pixels."""

    name: Literal["vdvae"] = "vdvae"
    encoder_blocks: Blocks = "32x3,32d2,16x3,16d2,8x3,8d2,4x2,4d4,1x2"
    """Blocks of the encoder from the images' resolution (padding included) down. `32x3`: three blocks at 32x32.
    `32d2`: one block at 32x32, then pooling by 2."""
    decoder_blocks: Blocks = "1x1,4m1,4x1,8m4,8x3,16m8,16x4,32m16,32x5"
    """Blocks of the decoder in the order of sampling, one latent group each. `8x3`: three blocks at 8x8. `8m4`: one
    block at 8x8, to whose input the upsampled state of 4x4 is added."""
    width: Count = 64
    """Channels of encoder and decoder."""
    widths: Annotated[str, Field(max_length=1_000)] = ""
    """Other widths for some resolutions, as `8:512,4:512`. They must not shrink as the resolution falls."""
    bottleneck: Annotated[float, Field(gt=0, le=8)] = 0.25
    """Inner channels of a block as a share of the width, rounded down."""
    latent_channels: Count = 16
    """Channels of each latent group."""
    start_tensors_up_to: Annotated[int, Field(ge=0, le=2**14)] = 64
    """The highest resolution at which the decoder's state starts from a learned tensor; above it starts from zero."""
    pixel_mean: Annotated[float, Field(ge=0, le=255)] = 127.5
    """Subtracted from pixels in 0..255 before the encoder."""
    pixel_std: Annotated[float, Field(gt=0, le=255)] = 127.5
    """Divides pixels in 0..255, less their mean, before the encoder."""
    likelihood: Likelihood = LogisticMixtureLikelihood(bin_rule="exact")
    """p(x | z)."""

    @model_validator(mode="after")
    def _check_architecture(self) -> Self:
        options = self.options
        for resolution, width in options.widths.items():
            if int(width * self.bottleneck) < 1:
                raise ValueError(
                    f"model.bottleneck={self.bottleneck:g} leaves no inner channel of the {width} at resolution "
                    f"{resolution}; it must be at least {1 / width:g}"
                )
        return self

    @property
    def options(self) -> VDVAEOptions:
        """The blocks and widths that the strings describe."""
        return parse_options(self.encoder_blocks, self.decoder_blocks, self.width, self.widths)

    def build(
        self, image_shape: tuple[int, int, int], border: int, bits: int, condition: Condition | None = None
    ) -> "VDVAE":
        """The model for padded images of this shape. Raises ValueError for images of another size than the encoder's
        first resolution.
        """
        return VDVAE(self, image_shape, border, bits, condition.size if condition else 0)


class InferredLatent(NamedTuple):
    """The latent of one group, inferred for a batch, or those of n groups of one shape, (n, B, ...)."""

    raw_posterior: Tensor
    raw_prior: Tensor
    """(B, 2 latent_channels, R, R) each: means, then logarithms of sigma."""
    z: Tensor
    """(B, latent_channels, R, R)."""

    @property
    def terms(self) -> LatentTerms:
        return latent_terms(normal(self.raw_posterior), normal(self.raw_prior), self.z)


class VDVAE(VAE):
    """The model described at the top of this file.

    `border`: pixels on every side that are padding. They are part of the network's input, but not of the likelihood
    or `num_dimensions`. `bits`: color depth. Raises ValueError for images of another size than the encoder's first
    resolution.
    """

    def __init__(
        self,
        config: VDVAEConfig,
        image_shape: tuple[int, int, int],
        border: int = 0,
        bits: int = 8,
        condition_size: int = 0,
    ):
        super().__init__(image_shape, border, bits, condition_size)
        options, self.config = config.options, config
        check_size(options, self.image_shape)
        self.groups = latent_groups(options, config.latent_channels)
        channels = self.image_shape[0]
        self.encoder = Encoder(options, channels, config.bottleneck)
        self.decoder = Decoder(
            options,
            config.likelihood.num_outputs(channels),
            config.latent_channels,
            config.bottleneck,
            config.start_tensors_up_to,
        )
        if condition_size:
            start_width = options.widths[options.decoder[0].resolution]
            self.conditioning = Conditioning(condition_size, start_width, config.latent_channels, len(self.groups))

    # ---- the interface of VAE ---------------------------------------------------------------------------------------

    def features(self, x: Tensor, condition: Tensor | None = None) -> dict[int, Tensor]:
        """By resolution."""
        check_condition(self, condition)
        return self.encoder((255 * x - self.config.pixel_mean) * (1 / self.config.pixel_std))

    def bound(
        self, x: Tensor, features: dict[int, Tensor], noise: Sequence[Tensor], condition: Tensor | None = None
    ) -> VAEOutput:
        outputs, latents = self._infer(features, noise, condition)
        likelihood = self.likelihood(without_border(outputs, self.border))
        log_px = likelihood.log_prob(without_border(x, self.border)).flatten(1).sum(1)  # (B,)
        return vae_output(log_px, [stacked(latents[run]).terms for run in runs_of_one_shape(self.groups)])

    def encode(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        _, latents = self.infer(x, noise, condition)
        return [latent.z for latent in latents]

    def pixel_distribution(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> PixelDistribution:
        return self.likelihood(self._decode(lambda k, raw_prior: latents[k], len(latents[0]), condition))

    def sample_with_latents(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        given: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        outputs, latents = self.generate(noise, temperature, condition, given)
        return self.likelihood(outputs).mean, latents

    def prior_noise(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        noise = []

        def standardize(k: int, raw_prior: Tensor) -> Tensor:
            prior = normal(raw_prior)
            noise.append((latents[k] - prior.mean) / prior.sigma)
            return latents[k]

        self._decode(standardize, len(latents[0]), condition)
        return noise

    def compilable_cells(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, EncoderBlock | TopDownBlock))

    # ---- raw outputs and distributions, for tests and metrics -------------------------------------------------------

    def infer(
        self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None
    ) -> tuple[Tensor, list[InferredLatent]]:
        """Raw decoder outputs (B, C_out, H, W) and each group's latent, for images x (B, C, H, W) in [0, 1]."""
        return self._infer(self.features(x, condition), noise, condition)

    def generate(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        given: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Raw decoder outputs (B, C_out, H, W), and the latents, as `sample_with_latents` describes them."""
        temperatures, latents = group_temperatures(temperature, self.groups), list(given)

        def sample_group(k: int, raw_prior: Tensor) -> Tensor:
            if k == len(latents):
                latents.append(normal(raw_prior).sample(temperatures[k] * noise[k]))
            return latents[k]

        return self._decode(sample_group, len(given[0] if given else noise[0]), condition), latents

    def likelihood(self, outputs: Tensor) -> PixelDistribution:
        """p(x | z) of raw decoder outputs."""
        return self.config.likelihood.build(outputs, self.bits)

    # ---- the two ways through the decoder ---------------------------------------------------------------------------

    def _infer(
        self, features: dict[int, Tensor], noise: Sequence[Tensor], condition: Tensor | None
    ) -> tuple[Tensor, list[InferredLatent]]:
        start, priors = self._embeddings(condition)
        latents: list[InferredLatent] = []

        def infer_group(k: int, h: Tensor) -> Tensor:
            feature = features[self.decoder.plan[k].resolution]
            state, *latent = self.decoder.blocks[k](h, feature, noise[k], priors[k])
            latents.append(InferredLatent(*latent))
            return state

        return self.decoder(infer_group, len(noise[0]), start), latents

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


def check_size(options: VDVAEOptions, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless the images have the encoder's first resolution."""
    _, height, width = image_shape
    if height != options.size or width != options.size:
        raise ValueError(
            f"model.encoder_blocks starts at resolution {options.size}, but the images have {height}x{width} pixels, "
            f"padding included; change the blocks, data.size or data.pad"
        )


def latent_groups(options: VDVAEOptions, latent_channels: int) -> tuple[LatentGroup, ...]:
    """One per block of the decoder, numbered within its resolution."""
    counts: Counter[int] = Counter()
    groups = []
    for r, _ in options.decoder:
        groups.append(LatentGroup(f"{r}x{r}_group{counts[r]:02d}", (latent_channels, r, r)))
        counts[r] += 1
    return tuple(groups)


def stacked(latents: Sequence[InferredLatent]) -> InferredLatent:
    """Latents of one shape, (n, B, ...)."""
    return InferredLatent(*(stack_with_format(tensors, like=latents[-1].z) for tensors in zip(*latents, strict=True)))
