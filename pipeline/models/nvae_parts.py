"""The parts of NVAE and how they are put together from its config.

A level is a number of halvings: level 0 is the image's resolution. The width of a level is encoder_channels or
decoder_channels times 2^level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pipeline.models.base import LatentGroup, check_divisible
from pipeline.nn.cells import CELLS, ResidualCell, Resize
from pipeline.nn.layers import WNConv2d

if TYPE_CHECKING:
    from pipeline.models.nvae import NVAEConfig


class EncoderStep(nn.Module):
    """Cells that compute one latent group's feature, and the 1x1 convolution that adds the decoder's state to it.

    The first group in the order of sampling has no decoder state, so its step has no convolution.
    """

    def __init__(self, cells: list[nn.Module], combine: nn.Module | None):
        super().__init__()
        self.cells = nn.Sequential(*cells)
        self.combine = combine


class DecoderStep(nn.Module):
    """Cells that compute the decoder's state for one latent group, and the 1x1 convolution that merges the latent."""

    def __init__(self, cells: list[nn.Module], combine: nn.Module):
        super().__init__()
        self.cells = nn.Sequential(*cells)
        self.combine = combine


def check_image_shape(config: NVAEConfig, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError, naming sizes that work, unless images are square and divisible by 2^num_halvings."""
    _, height, width = image_shape
    if height != width:
        raise ValueError(f"NVAE needs square images, got {height}x{width}; crop or pad them")
    check_divisible(image_shape, 2**config.num_halvings, "nvae", "lower model.num_blocks")


def latent_groups(config: NVAEConfig, size: int) -> tuple[LatentGroup, ...]:
    """The latent groups of images of this size, in the order of sampling."""
    groups = []
    for scale, count in enumerate(config.groups_per_scale):
        r = size >> (config.num_halvings - scale)
        groups += [LatentGroup(f"{r}x{r}_group{n:02d}", (config.latent_channels, r, r)) for n in range(count)]
    return tuple(groups)


def _cell(config: NVAEConfig, kind: str, base_channels: int, level: int, resize: Resize = "same") -> ResidualCell:
    return ResidualCell(base_channels << level, resize, CELLS[config.cells][kind], config.squeeze_excitation)


def build_preprocess(config: NVAEConfig) -> nn.Sequential:
    """Blocks of cells. The last cell of each block halves the resolution."""
    sizes: list[Resize] = ["same"] * (config.num_preprocess_cells - 1) + ["down"]
    return nn.Sequential(
        *(
            _cell(config, "preprocess", config.encoder_channels, level, resize)
            for level in range(config.num_blocks)
            for resize in sizes
        )
    )


def build_postprocess(config: NVAEConfig) -> nn.Sequential:
    """Blocks of cells. The first cell of each block doubles the resolution."""
    cells = []
    for level in range(config.num_blocks, 0, -1):
        cells.append(_cell(config, "postprocess", config.decoder_channels, level, "up"))
        cells += [
            _cell(config, "postprocess", config.decoder_channels, level - 1)
            for _ in range(config.num_postprocess_cells - 1)
        ]
    return nn.Sequential(*cells)


def build_encoder(config: NVAEConfig) -> nn.ModuleList:
    """One step per group, highest resolution first: the reverse of the order of sampling. None for a single group."""
    levels = latent_levels(config)[::-1]
    steps = nn.ModuleList()
    for k, level in enumerate(levels if not config.is_vanilla else []):
        halve = k > 0 and levels[k - 1] != level
        cells = [_cell(config, "encoder", config.encoder_channels, level - 1, "down")] if halve else []
        cells += [_cell(config, "encoder", config.encoder_channels, level) for _ in range(config.num_encoder_cells)]
        is_top = k == len(levels) - 1
        combine = None if is_top else WNConv2d(config.decoder_channels << level, config.encoder_channels << level, 1)
        steps.append(EncoderStep(cells, combine))
    return steps


def build_decoder(config: NVAEConfig) -> nn.ModuleList:
    """One step per group in the order of sampling; the first has no cells. None for a single group."""
    levels = latent_levels(config)
    steps = nn.ModuleList()
    for k, level in enumerate(levels if not config.is_vanilla else []):
        cells = []
        if k > 0:
            double = levels[k - 1] != level
            cells = [_cell(config, "decoder", config.decoder_channels, level + 1, "up")] if double else []
            cells += [_cell(config, "decoder", config.decoder_channels, level) for _ in range(config.num_decoder_cells)]
        width = config.decoder_channels << level
        steps.append(DecoderStep(cells, WNConv2d(width + config.latent_channels, width, 1)))
    return steps


def build_samplers(config: NVAEConfig) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Convolutions that give the raw parameters of every posterior, and of every prior but the first."""
    num_outputs = 2 * config.latent_channels
    levels = latent_levels(config)
    posteriors = [WNConv2d(config.encoder_channels << level, num_outputs, 3, padding=1) for level in levels]
    priors = [WNConv2d(config.decoder_channels << level, num_outputs, 1) for level in levels[1:]]
    return nn.ModuleList(posteriors), nn.ModuleList(priors)


def latent_levels(config: NVAEConfig) -> list[int]:
    """The level of each group in the order of sampling."""
    return [config.num_halvings - scale for scale, count in enumerate(config.groups_per_scale) for _ in range(count)]
