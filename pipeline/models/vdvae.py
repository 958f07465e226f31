"""VDVAE: a very deep hierarchical VAE (Child 2020, arXiv:2011.10650).

The encoder keeps the last feature map of each resolution. The decoder has a state for each resolution. Every block of
it has one latent group: the prior is computed from the state, the posterior from the state and the feature of its
resolution, and the latent is added to the state. There is no normalization, and no bound on means and sigmas.

Shape legend: base.py. Encoder and decoder: vdvae_parts.py. The strings that describe them: vdvae_options.py.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from pipeline.models.base import ModelConfig
from pipeline.models.conditions import Condition
from pipeline.models.likelihoods import Likelihood, LogisticMixtureLikelihood
from pipeline.models.top_down import TopDownVAE, named_groups
from pipeline.models.vdvae_options import VDVAEOptions, parse_options
from pipeline.models.vdvae_parts import NORMALS, Decoder, Encoder
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


class VDVAE(TopDownVAE):
    """The model described at the top of this file.

    `border`: pixels on every side that are padding. They are part of the network's input, but not of the likelihood
    or `num_dimensions`. `bits`: color depth. Raises ValueError for images of another size than the encoder's first
    resolution.
    """

    normals = NORMALS

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
        check_size(options.size, self.image_shape)
        self.groups = named_groups((config.latent_channels, r, r) for r, _ in options.decoder)
        channels = self.image_shape[0]
        self.encoder = Encoder(options, channels, config.bottleneck)
        self.decoder = Decoder(
            options,
            config.likelihood.num_outputs(channels),
            config.latent_channels,
            config.bottleneck,
            config.start_tensors_up_to,
        )
        self.add_conditioning(options.widths[options.decoder[0].resolution])

    def network_input(self, x: Tensor) -> Tensor:
        return (255 * x - self.config.pixel_mean) * (1 / self.config.pixel_std)


def check_size(size: int, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless the images have the encoder's first resolution."""
    _, height, width = image_shape
    if height != size or width != size:
        raise ValueError(
            f"model.encoder_blocks starts at resolution {size}, but the images have {height}x{width} pixels, padding "
            "included; change the blocks, data.size or data.pad"
        )
