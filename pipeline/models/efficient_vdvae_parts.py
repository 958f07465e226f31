"""The encoder and the decoder of Efficient-VDVAE, built from its config.

Levels are counted from the images' resolution down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.top_down import TopDownBlock, TopDownDecoder
from pipeline.nn.bottleneck import Bottleneck, conv2d, scale_weight
from pipeline.nn.latent_normals import LatentNormals

if TYPE_CHECKING:
    from pipeline.models.efficient_vdvae import EfficientVDVAEConfig, Level

SLOPE = 0.1
"""Of the activation after a convolution that changes the resolution, for negative values."""


class Cells:
    """Builds the blocks of one level."""

    def __init__(self, config: EfficientVDVAEConfig, level: Level, num_groups: int):
        self.config, self.level, self.num_groups = config, level, num_groups
        self.kernel = 3 if level.resolution > 1 else 1

    def bottleneck(self, channels: int, out_channels: int, inner: int, residual: bool = False) -> Bottleneck:
        outer_kernel = min(self.config.outer_kernel, self.kernel)
        widths = [channels, *[inner] * (self.config.num_layers + 1), out_channels]
        kernels = [outer_kernel, *[self.kernel] * self.config.num_layers, outer_kernel]
        block = Bottleneck(widths, kernels, F.silu, residual)
        for conv in block.convs:
            initialize(conv)
        return block

    def residual(self, width: int) -> nn.Sequential:
        """Residual blocks; the last convolution of each starts small."""
        inner = int(width * self.level.bottleneck)
        blocks = [self.bottleneck(width, width, inner, residual=True) for _ in range(self.config.residual_blocks)]
        for block in blocks:
            scale_weight(block.convs[-1], 1 / sqrt(self.num_groups))
        return nn.Sequential(*blocks)


class EncoderLevel(nn.Module):
    """Residual blocks, the feature for the decoder, and the convolution that reduces the resolution."""

    def __init__(self, cells: Cells, next_width: int):
        super().__init__()
        level = cells.level
        self.blocks = nn.ModuleList(cells.residual(level.encoder_width) for _ in range(level.encoder_blocks + 1))
        self.skip = conv1x1(level.encoder_width, level.decoder_width)
        self.pool = None
        if level.stride > 1:
            self.pool = initialize(nn.Conv2d(level.encoder_width, next_width, level.stride, level.stride))


class Encoder(nn.Module):
    """Images to one feature for each level."""

    def __init__(self, config: EfficientVDVAEConfig, levels: list[Level], channels: int, num_groups: int):
        super().__init__()
        widths = [level.encoder_width for level in levels]
        self.stem = conv1x1(channels, widths[0])
        self.levels = nn.ModuleList(
            EncoderLevel(Cells(config, level, num_groups), after)
            for level, after in zip(levels, [*widths[1:], widths[-1]], strict=True)
        )

    @property
    def blocks(self) -> Iterator[nn.Module]:
        return (block for level in self.levels for block in level.blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, S, S) -> (B, width of the decoder, R, R) of every level."""
        h, features = self.stem(x), []
        for level in self.levels:
            for block in level.blocks:
                h = block(h)
            features.append(level.skip(h))
            if level.pool is not None:
                h = F.leaky_relu(level.pool(h), SLOPE)
        return features


class Unpool(nn.Module):
    """(B, C, R, R) -> (B, C', qR, qR): a 1x1 convolution, nearest neighbors, and a learned map, zero at first."""

    def __init__(self, channels: int, out_channels: int, stride: int, resolution: int):
        super().__init__()
        self.stride = stride
        self.conv = conv1x1(channels, out_channels)
        self.map = nn.Parameter(torch.zeros(1, out_channels, resolution, resolution))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv(x), SLOPE)
        return F.interpolate(x, scale_factor=self.stride, mode="nearest") + self.map


class Block(TopDownBlock):
    """One latent group. `unpool`, of the first block of a level: applied to the state before the block."""

    def __init__(self, cells: Cells, normals: LatentNormals, unpool: Unpool | None):
        super().__init__(normals)
        level, width = cells.level, cells.level.decoder_width
        inner = int(width * level.bottleneck)
        self.unpool = unpool
        self.posterior = nn.Sequential(
            cells.bottleneck(2 * width, width, inner), conv1x1(width, 2 * level.latent_channels)
        )
        self.prior = cells.bottleneck(width, 2 * width, inner)
        self.prior_parameters = conv1x1(width, 2 * level.latent_channels)
        self.project = conv1x1(level.latent_channels, width)
        scale_weight(self.project, 1 / sqrt(cells.num_groups))
        self.residual = cells.residual(width)

    def prior_outputs(self, h: Tensor) -> tuple[Tensor, Tensor]:
        extra, parameters = self.prior(h).chunk(2, dim=1)
        return self.prior_parameters(parameters), extra


class Decoder(TopDownDecoder):
    """One state, which starts from a learned tensor, and the blocks that change it, lowest level first."""

    def __init__(self, config: EfficientVDVAEConfig, levels: list[Level], num_outputs: int, normals: LatentNormals):
        super().__init__()
        lowest, num_groups = levels[-1], sum(level.groups for level in levels)
        self.start = nn.Parameter(torch.empty(1, lowest.decoder_width, lowest.resolution, lowest.resolution))
        nn.init.uniform_(self.start, *(sign * sqrt(3 / self.start.numel()) for sign in (-1, 1)))
        self.feature_keys = [i for i in reversed(range(len(levels))) for _ in range(levels[i].groups)]
        blocks, before = [], lowest.decoder_width
        for level in reversed(levels):
            cells = Cells(config, level, num_groups)
            unpool = Unpool(before, level.decoder_width, level.stride, level.resolution) if level.stride > 1 else None
            blocks += [Block(cells, normals, unpool if n == 0 else None) for n in range(level.groups)]
            before = level.decoder_width
        self.blocks = nn.ModuleList(blocks)
        self.output = conv1x1(levels[0].decoder_width, num_outputs)

    def forward(self, step: Callable[[int, Tensor], Tensor], batch_size: int, offset: Tensor | None = None) -> Tensor:
        h = self.start.expand(batch_size, -1, -1, -1)
        if offset is not None:
            h = h + offset[:, :, None, None]
        for k, block in enumerate(self.blocks):
            h = step(k, h if block.unpool is None else block.unpool(h))
        return self.output(h)


def conv1x1(channels: int, out_channels: int) -> nn.Conv2d:
    return initialize(conv2d(channels, out_channels, 1))


def initialize(conv: nn.Conv2d) -> nn.Conv2d:
    """Xavier uniform weights and a bias of zero."""
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
