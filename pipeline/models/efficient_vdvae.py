"""Efficient-VDVAE (Hazami, Mama & Thurairatnam 2022, arXiv:2203.13751): VDVAE with levels in place of resolutions.

Each level of the encoder gives one feature, to the latent groups of the same level of the decoder. Learned convolutions
change the resolution. Sigmas are a softplus of the network's outputs, whose small beta makes gradients smoother.

Shape legend: base.py. The interface: top_down.py. Encoder and decoder: efficient_vdvae_parts.py.
"""

from math import prod
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from torch import Tensor

from pipeline.models.base import ModelConfig, check_divisible
from pipeline.models.conditions import Condition
from pipeline.models.efficient_vdvae_parts import Decoder, Encoder
from pipeline.models.likelihoods import Likelihood, LogisticMixtureLikelihood
from pipeline.models.top_down import TopDownVAE, named_groups
from pipeline.models.vdvae_options import MAX_RESOLUTION
from pipeline.nn.distributions import ScaleRule, pixel_values
from pipeline.nn.latent_normals import LatentNormals
from pipeline.schema import Count, Layers

MAX_LEVELS, MAX_BLOCKS = 200, 1_000
LN_2 = 0.6931472
"""The beta of the release, with which an output of 0 gives a sigma of 1 within 2e-8."""
list_of_levels = Field(min_length=1, max_length=MAX_LEVELS, strict=False)


class Level(NamedTuple):
    """One level; `resolution` is that before its stride."""

    resolution: int
    stride: int
    encoder_width: int
    decoder_width: int
    encoder_blocks: int
    groups: int
    latent_channels: int
    bottleneck: float


class EfficientVDVAEConfig(ModelConfig):
    """Architecture of Efficient-VDVAE. Lists have an entry for each level, from the images' resolution down, or a
    single one for all levels. The defaults make a small model for images of 32x32 pixels.
    """

    name: Literal["efficient_vdvae"] = "efficient_vdvae"
    strides: Annotated[tuple[Layers, ...], list_of_levels] = (1, 2, 1, 2, 1, 2, 4, 1)
    """By how much each level divides the resolution for the next one. The last is 1."""
    encoder_widths: Annotated[tuple[Count, ...], list_of_levels] = (64,)
    """Channels of each level of the encoder. They change after a stride above 1 only."""
    decoder_widths: Annotated[tuple[Count, ...], list_of_levels] = (64,)
    """Channels of each level of the decoder. They change at a stride above 1 only."""
    encoder_blocks: Annotated[tuple[Annotated[int, Field(ge=0, le=100, strict=True)], ...], list_of_levels] = (0,)
    """Blocks of each level of the encoder before the one that gives its feature."""
    groups: Annotated[tuple[Layers, ...], list_of_levels] = (1,)
    """Latent groups of each level."""
    latent_channels: Annotated[tuple[Count, ...], list_of_levels] = (16,)
    """Channels of the latent groups of each level."""
    bottleneck: Annotated[tuple[Annotated[float, Field(gt=0, le=8)], ...], list_of_levels] = (0.25,)
    """Inner channels of the blocks of each level as a share of the width, rounded down."""
    residual_blocks: Layers = 1
    """Residual bottlenecks in one block of the encoder, and after one latent group."""
    num_layers: Layers = 2
    """3x3 convolutions in one bottleneck (1x1 on maps of one pixel)."""
    outer_kernel: Literal[1, 3] = 1
    """Kernel size of a bottleneck's first and last convolution."""
    scale: ScaleRule = "softplus"
    """Sigmas of latents from the network's outputs: `exp(scale_beta * output)`, or `softplus` with this beta."""
    scale_beta: Annotated[float, Field(gt=0, le=10)] = LN_2
    """Below 1 the gradients of the sigmas are smoother."""
    residual_posterior: bool = False
    """Whether the posterior's outputs are relative to the prior's."""
    likelihood: Likelihood = LogisticMixtureLikelihood(bin_rule="exact", scale="softplus", scale_beta=LN_2)
    """p(x | z)."""

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        count = len(self.strides)
        for name in PER_LEVEL:
            if len(getattr(self, name)) not in (1, count):
                raise ValueError(
                    f"model.{name}: {len(getattr(self, name))} entries for the {count} levels of model.strides; give "
                    "one for each level, or a single one"
                )
        if self.strides[-1] != 1:
            raise ValueError(f"model.strides: the last is {self.strides[-1]}, but nothing follows it; it must be 1")
        if prod(self.strides) > MAX_RESOLUTION:
            raise ValueError(f"model.strides: their product is above {MAX_RESOLUTION:,}")
        levels = self.levels(prod(self.strides))
        _check_widths(levels)
        blocks = sum(level.groups + level.encoder_blocks + 1 for level in levels)
        if blocks * self.residual_blocks > MAX_BLOCKS:
            raise ValueError(f"model.groups, model.encoder_blocks: more than {MAX_BLOCKS:,} blocks")
        return self

    def levels(self, size: int) -> list[Level]:
        """For images of this size."""
        count, levels = len(self.strides), []
        for i, stride in enumerate(self.strides):
            own = {name: getattr(self, name)[i if len(getattr(self, name)) == count else 0] for name in PER_LEVEL}
            levels.append(Level(size, stride, *own.values()))
            size //= stride
        return levels

    def build(
        self, image_shape: tuple[int, int, int], border: int, bits: int, condition: Condition | None = None
    ) -> "EfficientVDVAE":
        """The model for padded images of this shape. Raises ValueError for a size that the strides do not divide."""
        return EfficientVDVAE(self, image_shape, border, bits, condition.size if condition else 0)


PER_LEVEL = ("encoder_widths", "decoder_widths", "encoder_blocks", "groups", "latent_channels", "bottleneck")
"""Settings with an entry for each level, in the order of the fields of `Level`."""


class EfficientVDVAE(TopDownVAE):
    """The model described at the top of this file.

    `border`: pixels on every side that are padding. They are part of the network's input, but not of the likelihood
    or `num_dimensions`. `bits`: color depth. Raises ValueError for images that are not square, or whose size is not a
    multiple of the product of the strides.
    """

    def __init__(
        self,
        config: EfficientVDVAEConfig,
        image_shape: tuple[int, int, int],
        border: int = 0,
        bits: int = 8,
        condition_size: int = 0,
    ):
        super().__init__(image_shape, border, bits, condition_size)
        self.config = config
        channels, height, width = self.image_shape
        if height != width:
            raise ValueError(f"Efficient-VDVAE needs square images, got {height}x{width}; crop or pad them")
        check_divisible(self.image_shape, prod(config.strides), "efficient_vdvae", "change model.strides")
        levels = config.levels(height)
        self.groups = named_groups(
            (level.latent_channels, level.resolution, level.resolution)
            for level in reversed(levels)
            for _ in range(level.groups)
        )
        self.normals = LatentNormals(config.scale, config.scale_beta, config.residual_posterior)
        self.encoder = Encoder(config, levels, channels, len(self.groups))
        self.decoder = Decoder(config, levels, config.likelihood.num_outputs(channels), self.normals)
        self.add_conditioning(levels[-1].decoder_width)

    def network_input(self, x: Tensor) -> Tensor:
        return pixel_values(x, getattr(self.config.likelihood, "bin_rule", "exact"))


def _check_widths(levels: list[Level]) -> None:
    """Raises ValueError where channels change without a convolution that changes them, or none is left."""
    for number, (level, after) in enumerate(zip(levels, levels[1:], strict=False)):
        for name in ("encoder_widths", "decoder_widths"):
            field = name.removesuffix("s")
            widths = getattr(level, field), getattr(after, field)
            if level.stride == 1 and widths[0] != widths[1]:
                raise ValueError(
                    f"model.{name}: {widths[0]} and {widths[1]} channels at levels {number} and {number + 1}; they can "
                    "differ only where model.strides is above 1"
                )
    for number, level in enumerate(levels):
        width = min(level.encoder_width, level.decoder_width)
        if int(width * level.bottleneck) < 1:
            raise ValueError(
                f"model.bottleneck: {level.bottleneck:g} leaves no inner channel of the {width} at level {number}; it "
                f"must be at least {1 / width:g}"
            )
