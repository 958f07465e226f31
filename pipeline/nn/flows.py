"""Volume-preserving autoregressive flows on the posterior's samples (IAF, Kingma et al. 2016, with shifts only)."""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.layers import MaskedWNConv2d

EXPANSION = 6
LOG_INITIAL_SHIFT = -2.302585092994046  # log 0.1


class ShiftFlow(nn.Module):
    """z -> z - mu(z), for z (B, channels, H, W).

    mu of a pixel and channel depends only on earlier ones in raster order (`mirrored`: in reversed spatial order), so
    the log-determinant is exactly 0. ELU is applied twice after the depthwise convolution, as in the reference release.
    """

    def __init__(self, channels: int, mirrored: bool):
        super().__init__()
        hidden = EXPANSION * channels
        self.expand = MaskedWNConv2d(channels, hidden, 3, strict=True, mirrored=mirrored)
        self.depthwise = MaskedWNConv2d(hidden, hidden, 5, groups=hidden, mirrored=mirrored)
        self.shift = MaskedWNConv2d(hidden, channels, 1, bias=True, mirrored=mirrored)
        self.shift.log_norm.data.add_(LOG_INITIAL_SHIFT)

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.depthwise(F.elu(self.expand(z)))
        return z - self.shift(F.elu(F.elu(hidden)))


class FlowPair(nn.Module):
    """Two shift flows, the second in mirrored order."""

    def __init__(self, channels: int):
        super().__init__()
        self.raster = ShiftFlow(channels, mirrored=False)
        self.mirrored = ShiftFlow(channels, mirrored=True)

    def forward(self, z: Tensor) -> Tensor:
        return self.mirrored(self.raster(z))
