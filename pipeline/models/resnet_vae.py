"""A VAE of residual blocks (He et al. 2016, arXiv:1512.03385) with spectral normalization (Miyato et al. 2018,
arXiv:1802.05957) of every convolution.

    encoder   3x3 conv to 32, batch norm, ReLU; stages 64-128-256-512 of two blocks, the first at stride 2; flattened
    decoder   linear to 512 at that size; the stages in reverse, the last block of each with nearest upsampling;
              3x3 conv from 32

The encoder takes values in [-1, 1]. A condition is concatenated to the flattened features and to the latent.

Each convolution applies W / sigma(W), with torch's parametrization. (NVAE only penalizes sigma.) In training, sigma is
estimated by one step of the power iteration per forward pass. The iteration's vectors are buffers: checkpoints hold
them, and a skipped step restores them. They depend on the weights alone, so they are equal on every process.
"""

from itertools import pairwise
from math import prod
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pipeline.models.base import check_divisible
from pipeline.models.conditions import Condition
from pipeline.models.likelihoods import Likelihood, SquaredErrorLikelihood
from pipeline.models.vector_vae import TORCH_MOMENTUM, VectorVAE, VectorVAEConfig, concatenated
from pipeline.nn.batch_norm import BatchNorm2d
from pipeline.nn.posterior import Posterior
from pipeline.schema import Count, Layers

Resize = Literal["same", "down", "up"]


class ResNetVAEConfig(VectorVAEConfig):
    """Architecture of a residual VAE."""

    name: Literal["resnet_vae"] = "resnet_vae"
    latent_size: Count = 256
    """Units of the latent vector."""
    likelihood: Likelihood = SquaredErrorLikelihood(output="tanh")
    """p(x | z)."""
    stem_width: Count = 32
    """Channels at the resolution of the image."""
    stage_widths: Annotated[tuple[Count, ...], Field(min_length=1, max_length=10, strict=False)] = (64, 128, 256, 512)
    """Channels of each stage. Each stage halves the resolution."""
    num_blocks: Layers = 2
    """Residual blocks per stage."""

    def build(
        self, image_shape: tuple[int, int, int], border: int, bits: int, condition: Condition | None = None
    ) -> "ResNetVAE":
        """The model for padded images of this shape. Raises ValueError for a size that the stages cannot halve."""
        return ResNetVAE(self, image_shape, border, bits, condition.size if condition else 0)


class SpectralConv2d(nn.Conv2d):
    """Convolution whose weight, as a matrix (C_out, rest), has largest singular value 1. The output keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        device = "cpu" if x.is_meta else x.device.type  # torch knows no autocast on the meta device
        with torch.autocast(device, enabled=False):  # bfloat16 has too few digits for a power iteration
            weight = self.current_weight()
        return self._conv_forward(x, weight, self.bias)

    def current_weight(self) -> Tensor:
        """(C_out, C_in, k, k) of spectral norm 1. In training, every call makes one step of the power iteration."""
        if self.training:
            return self.weight
        # With train.ema_decay the singular vectors are averages too, and an average of unit vectors is shorter than 1.
        vectors = self.parametrizations.weight[0]
        return self.weight * (vectors._u.norm() * vectors._v.norm())


class ResidualBlock(nn.Module):
    """relu(skip(x) + two 3x3 convolutions of x). The first resizes. Batch norm follows every convolution."""

    def __init__(self, channels: int, out_channels: int, resize: Resize):
        super().__init__()
        self.resize = resize
        self.conv1 = SpectralConv2d(channels, out_channels, 3, stride=2 if resize == "down" else 1)
        self.bn1 = BatchNorm2d(out_channels, activation=F.relu, momentum=TORCH_MOMENTUM)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3)
        self.bn2 = BatchNorm2d(out_channels, momentum=TORCH_MOMENTUM)
        self.skip = None
        if resize == "down" or channels != out_channels:
            self.skip = nn.Sequential(
                SpectralConv2d(channels, out_channels, 1), BatchNorm2d(out_channels, momentum=TORCH_MOMENTUM)
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.resize == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        branch = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        if self.resize == "down":
            # In place of stride 2 in the 1x1 convolution, which oneDNN computes wrongly for narrow channels_last inputs
            # (its issue 6035).
            x = x[:, :, ::2, ::2]
        return F.relu(branch + (x if self.skip is None else self.skip(x)))


class ResNetVAE(VectorVAE):
    """The model described at the top of this file. Raises ValueError unless the stages can halve height and width."""

    config: ResNetVAEConfig

    def __init__(self, config: ResNetVAEConfig, image_shape: tuple[int, int, int], *context):
        super().__init__(config, image_shape, *context)
        halvings = len(config.stage_widths)
        check_divisible(self.image_shape, 2**halvings, "resnet_vae")
        channels, height, width = self.image_shape
        stem_width, widths = config.stem_width, [config.stem_width, *config.stage_widths]
        self.top = (widths[-1], height >> halvings, width >> halvings)
        self.stem = SpectralConv2d(channels, stem_width, 3)
        self.stem_bn = BatchNorm2d(stem_width, activation=F.relu, momentum=TORCH_MOMENTUM)
        self.encoder = encoder_blocks(widths, config.num_blocks)
        self.posterior = Posterior(prod(self.top) + self.condition_size, config.latent_size, config.flows)
        self.decoder_start = nn.Linear(config.latent_size + self.condition_size, prod(self.top))
        self.decoder = decoder_blocks(widths[::-1], config.num_blocks)
        self.output = SpectralConv2d(stem_width, self.num_outputs, 3, bias=True)

    def _encode(self, x: Tensor, condition: Tensor | None) -> Tensor:
        features = self.encoder(self.stem_bn(self.stem(2 * x - 1)))
        return concatenated(features.flatten(1), condition)

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        start = self.decoder_start(concatenated(z, condition)).unflatten(1, self.top)
        return self.output(self.decoder(start))


def encoder_blocks(widths: list[int], num_blocks: int) -> nn.Sequential:
    """One stage from each width to the next. Its first block halves the size and changes the width."""
    blocks: list[nn.Module] = []
    for before, after in pairwise(widths):
        blocks.append(ResidualBlock(before, after, "down"))
        blocks += [ResidualBlock(after, after, "same") for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


def decoder_blocks(widths: list[int], num_blocks: int) -> nn.Sequential:
    """One stage from each width to the next. Its last block doubles the size and changes the width."""
    blocks: list[nn.Module] = []
    for before, after in pairwise(widths):
        blocks += [ResidualBlock(before, before, "same") for _ in range(num_blocks - 1)]
        blocks.append(ResidualBlock(before, after, "up"))
    return nn.Sequential(*blocks)
