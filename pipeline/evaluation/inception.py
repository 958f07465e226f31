"""The feature network of the Frechet Inception distance: Inception-v3 as TensorFlow's model of 2015-12-05 computes it.

Architecture: Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", sections 3 to 6. The
TensorFlow model differs from the paper and from torchvision's in two ways: its average pools leave the padding out of
the average, and its last block pools by maximum. Parameters have the names of the published weights file.

B images, C channels, H x W pixels.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resize = Literal["pytorch-fid", "tf1"]
"""How images become the network's input. pytorch-fid: as that package does, bilinear with pixel centers at half
integers, without antialiasing, then 2x - 1 of x in [0, 1]. tf1: as the original code in TensorFlow 1 and torch-fidelity
do, bilinear with pixel centers at integers, then (v - 128) / 128 of v in [0, 255]."""

FEATURES = 2048
"""Size of the features: the last layer before the classes, averaged over space."""
SIDE = 299
"""Pixels of the network's input."""
CLASSES = 1008
NORM_EPSILON = 1e-3


class Conv(NamedTuple):
    """A convolution of a block, with batch norm and ReLU; padded to keep its size unless it has a stride."""

    name: str
    channels: int
    kernel: int | tuple[int, int]
    stride: int = 1


Step = Conv | tuple[Conv, Conv] | Literal["average", "maximum", "halve"]
"""A convolution, two whose results are concatenated, or a pool of 3 x 3 pixels."""


class FrozenBatchNorm(nn.Module):
    """Batch norm by its running statistics."""

    def __init__(self, channels: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=NORM_EPSILON)


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, padding="valid"):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, kernel, stride, padding, bias=False)
        self.bn = FrozenBatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Branches whose results are concatenated in their order."""

    def __init__(self, inputs: int, *branches: list[Step]):
        super().__init__()
        self.branches, self.channels = branches, 0
        for branch in branches:
            channels = inputs
            for step in branch:
                channels = self._build(step, channels)
            self.channels += channels

    def _build(self, step: Step, inputs: int) -> int:
        """Makes the layers of a step. Returns its number of output channels."""
        if isinstance(step, str):
            return inputs
        if isinstance(step, Conv):
            padding = "same" if step.stride == 1 else "valid"
            self.add_module(step.name, ConvNorm(inputs, step.channels, step.kernel, step.stride, padding))
            return step.channels
        return sum(self._build(part, inputs) for part in step)

    def _apply_step(self, step: Step, x: Tensor) -> Tensor:
        if isinstance(step, Conv):
            return self.get_submodule(step.name)(x)
        if step == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if step == "maximum":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        if step == "halve":
            return F.max_pool2d(x, 3, stride=2)
        return torch.cat([self._apply_step(part, x) for part in step], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for branch in self.branches:
            result = x
            for step in branch:
                result = self._apply_step(step, result)
            results.append(result)
        return torch.cat(results, dim=1)


def block_35(inputs: int, pooled: int) -> Block:
    """At 35 x 35 pixels (figure 5 of the paper, with one 5 x 5 convolution)."""
    return Block(
        inputs,
        [Conv("branch1x1", 64, 1)],
        [Conv("branch5x5_1", 48, 1), Conv("branch5x5_2", 64, 5)],
        [Conv("branch3x3dbl_1", 64, 1), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)],
        ["average", Conv("branch_pool", pooled, 1)],
    )


def reduction_to_17(inputs: int) -> Block:
    """From 35 x 35 to 17 x 17 pixels (figure 10)."""
    return Block(
        inputs,
        [Conv("branch3x3", 384, 3, stride=2)],
        [Conv("branch3x3dbl_1", 64, 1), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, stride=2)],
        ["halve"],
    )


def block_17(inputs: int, inner: int) -> Block:
    """At 17 x 17 pixels: 7 x 7 convolutions as pairs of one-dimensional ones (figure 6)."""
    return Block(
        inputs,
        [Conv("branch1x1", 192, 1)],
        [Conv("branch7x7_1", inner, 1), Conv("branch7x7_2", inner, (1, 7)), Conv("branch7x7_3", 192, (7, 1))],
        [
            Conv("branch7x7dbl_1", inner, 1),
            Conv("branch7x7dbl_2", inner, (7, 1)),
            Conv("branch7x7dbl_3", inner, (1, 7)),
            Conv("branch7x7dbl_4", inner, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ],
        ["average", Conv("branch_pool", 192, 1)],
    )


def reduction_to_8(inputs: int) -> Block:
    """From 17 x 17 to 8 x 8 pixels."""
    return Block(
        inputs,
        [Conv("branch3x3_1", 192, 1), Conv("branch3x3_2", 320, 3, stride=2)],
        [
            Conv("branch7x7x3_1", 192, 1),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, 3, stride=2),
        ],
        ["halve"],
    )


def block_8(inputs: int, pool: Literal["average", "maximum"]) -> Block:
    """At 8 x 8 pixels: branches that end in two parallel convolutions (figure 7)."""
    return Block(
        inputs,
        [Conv("branch1x1", 320, 1)],
        [Conv("branch3x3_1", 384, 1), (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))],
        [
            Conv("branch3x3dbl_1", 448, 1),
            Conv("branch3x3dbl_2", 384, 3),
            (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ],
        [pool, Conv("branch_pool", 192, 1)],
    )


class Inception(nn.Module):
    """Features (B, 2048) of inputs (B, 3, 299, 299) in [-1, 1], which `network_input` makes."""

    size = FEATURES

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding="same")
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = block_35(192, 32)
        self.Mixed_5c = block_35(256, 64)
        self.Mixed_5d = block_35(288, 64)
        self.Mixed_6a = reduction_to_17(288)
        self.Mixed_6b = block_17(768, 128)
        self.Mixed_6c = block_17(768, 160)
        self.Mixed_6d = block_17(768, 160)
        self.Mixed_6e = block_17(768, 192)
        self.Mixed_7a = reduction_to_8(768)
        self.Mixed_7b = block_8(1280, "average")
        self.Mixed_7c = block_8(2048, "maximum")
        self.fc = nn.Linear(FEATURES, CLASSES)  # the classes; the file has it, and features do not use it

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))  # (B, 2048)


def network_input(pixels: Tensor, resize: Resize) -> Tensor:
    """(B, 3, 299, 299) in about [-1, 1] from pixels (B, 1 or 3, H, W) in [0, 255]; one channel is repeated."""
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"the feature network takes images of 1 or 3 channels, not {pixels.shape[1]}")
    pixels = pixels.expand(-1, 3, -1, -1)
    if resize == "pytorch-fid":
        return 2 * F.interpolate(pixels / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    return (resize_tf1(pixels) - 128) / 128


def resize_tf1(pixels: Tensor) -> Tensor:
    """(B, C, 299, 299): bilinear, where output pixel i lies at i H / 299, as in TensorFlow 1's `resize_bilinear`."""
    for dimension in (3, 2):
        size = pixels.shape[dimension]
        place = torch.arange(SIDE, dtype=pixels.dtype, device=pixels.device) * torch.tensor(size / SIDE)
        below = place.long()
        weight = place - below
        low = pixels.index_select(dimension, below)
        high = pixels.index_select(dimension, (below + 1).clamp(max=size - 1))
        pixels = low + (high - low) * (weight if dimension == 3 else weight[:, None])
    return pixels
