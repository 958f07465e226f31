"""The encoder and the decoder of VDVAE, built from its options.

Parameters are registered in the order of the reference release, on which the state of the optimizer depends.
"""

from collections.abc import Callable
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.top_down import TopDownBlock, TopDownDecoder
from pipeline.models.vdvae_options import BlockOptions, VDVAEOptions
from pipeline.nn.bottleneck import Bottleneck, conv2d, scale_weight
from pipeline.nn.latent_normals import LatentNormals

NORMALS = LatentNormals()
"""The raw scales are logarithms of sigma; the posterior is not relative to the prior."""


class EncoderBlock(nn.Module):
    """A residual bottleneck, then pooling and zero channels up to those of the lower resolution."""

    def __init__(self, block: BlockOptions, options: VDVAEOptions, bottleneck: float):
        super().__init__()
        resolution, self.factor = block
        width = options.widths[resolution]
        self.resolution = resolution // (self.factor or 1)
        self.added_channels = options.widths[self.resolution] - width
        self.bottleneck = build_bottleneck(resolution, width, (width, width), bottleneck, residual=True)
        scale_weight(self.bottleneck.convs[-1], 1 / sqrt(len(options.encoder)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, R, R) -> (B, W', R', R')."""
        x = self.bottleneck(x)
        if self.factor is not None:
            x = F.avg_pool2d(x, self.factor)
        return F.pad(x, (0, 0, 0, 0, 0, self.added_channels)) if self.added_channels else x


class Encoder(nn.Module):
    """Images to the last feature map of each resolution."""

    def __init__(self, options: VDVAEOptions, channels: int, bottleneck: float):
        super().__init__()
        self.size, self.resolutions = options.size, options.resolutions
        self.stem = conv2d(channels, options.widths[options.size], 3)
        self.blocks = nn.ModuleList(EncoderBlock(block, options, bottleneck) for block in options.encoder)

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """(B, C, S, S), standardized -> features (B, W(r), r, r) of the decoder's resolutions r."""
        h = self.stem(x)
        features = {self.size: h}
        for block in self.blocks:
            h = block(h)
            features[block.resolution] = h
        return {resolution: features[resolution] for resolution in self.resolutions}


class Block(TopDownBlock):
    """A block of VDVAE's decoder."""

    def __init__(self, resolution: int, width: int, latent_channels: int, bottleneck: float, num_blocks: int):
        super().__init__(NORMALS)
        self.sizes = [2 * latent_channels, width]
        outer = {"posterior": (2 * width, 2 * latent_channels), "prior": (width, 2 * latent_channels + width)}
        self.posterior, self.prior = (
            build_bottleneck(resolution, width, outer[name], bottleneck) for name in ("posterior", "prior")
        )
        self.project = conv2d(latent_channels, width, 1)
        self.residual = build_bottleneck(resolution, width, (width, width), bottleneck, residual=True)
        for conv in (self.project, self.residual.convs[-1]):
            scale_weight(conv, 1 / sqrt(num_blocks))
        nn.init.zeros_(self.prior.convs[-1].weight)

    def prior_outputs(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.prior(h).split(self.sizes, dim=1)


class Decoder(TopDownDecoder):
    """A state for each resolution, which starts from a learned tensor or from zero, and the blocks that change it."""

    def __init__(
        self,
        options: VDVAEOptions,
        num_outputs: int,
        latent_channels: int,
        bottleneck: float,
        start_tensors_up_to: int,
    ):
        super().__init__()
        self.plan, self.widths, self.size = options.decoder, options.widths, options.size
        self.feature_keys = [resolution for resolution, _ in self.plan]
        width = self.widths[self.size]
        self.gain = nn.Parameter(torch.ones(1, width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.blocks = nn.ModuleList(
            Block(r, self.widths[r], latent_channels, bottleneck, len(self.plan)) for r, _ in self.plan
        )
        self.start_resolutions = [r for r in options.resolutions if r <= start_tensors_up_to]
        self.starts = nn.ParameterList(torch.zeros(1, self.widths[r], r, r) for r in self.start_resolutions)
        self.output = conv2d(width, num_outputs, 1)

    def forward(self, step: Callable[[int, Tensor], Tensor], batch_size: int, offset: Tensor | None = None) -> Tensor:
        starts = zip(self.start_resolutions, self.starts, strict=True)
        states = {resolution: start.expand(batch_size, -1, -1, -1) for resolution, start in starts}
        for k, (resolution, mixed) in enumerate(self.plan):
            h = self._state(states, resolution, batch_size)
            if mixed is not None:
                lower = states[mixed][:, : self.widths[resolution]]
                h = h + F.interpolate(lower, scale_factor=resolution // mixed, mode="nearest")
            if k == 0 and offset is not None:
                h = h + offset[:, :, None, None]
            states[resolution] = step(k, h)
        return self.output(states[self.size] * self.gain + self.bias)

    def _state(self, states: dict[int, Tensor], resolution: int, batch_size: int) -> Tensor:
        """(B, W(r), r, r)."""
        if resolution in states:
            return states[resolution]
        return self.gain.new_zeros(batch_size, self.widths[resolution], resolution, resolution)


def build_bottleneck(
    resolution: int, width: int, outer: tuple[int, int], bottleneck: float, residual: bool = False
) -> Bottleneck:
    """Convolutions of 1, 3, 3 and 1; all 1x1 where a map has no more than 2x2 pixels.

    `outer`: channels of input and output. The inner width is a share of the resolution's width, whatever the input's.
    """
    inner, kernel = int(width * bottleneck), 3 if resolution > 2 else 1
    return Bottleneck([outer[0], inner, inner, inner, outer[1]], [1, kernel, kernel, 1], residual=residual)
