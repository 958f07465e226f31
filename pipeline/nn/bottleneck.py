"""Bottleneck blocks of hierarchical VAEs: convolutions without normalization, each after an activation."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """An activation before each convolution, the first included, and none after the last (VDVAE, figure 3).

    `widths`: channels before, between and after the convolutions. `kernels`: the odd size of each. All have stride 1
    and a bias, initialized to zero; the output has the input's size. `residual`: the input is added.
    """

    def __init__(
        self,
        widths: Sequence[int],
        kernels: Sequence[int],
        activation: Callable[[Tensor], Tensor] = F.gelu,
        residual: bool = False,
    ):
        super().__init__()
        assert len(widths) == len(kernels) + 1, "one width more than convolutions"
        self.activation, self.residual = activation, residual
        self.convs = nn.ModuleList(
            conv2d(*channels, kernel) for channels, kernel in zip(pairwise(widths), kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in self.convs:
            h = conv(self.activation(h))
        return x + h if self.residual else h


def conv2d(channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    """A convolution at stride 1 that keeps the size: torch's initial weights, and a bias of zero."""
    conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.bias)
    return conv


def scale_weight(conv: nn.Conv2d, factor: float) -> None:
    """Multiplies a new convolution's weight: the more residual branches, the less each adds at the beginning."""
    with torch.no_grad():
        conv.weight.mul_(factor)
