"""NVAE's residual cells (NVAE section 3.1.1, figure 3) and the architectures composed of them.

Every cell maps (B, C, H, W) to: the same shape ("same"); twice the channels at half the size ("down"); half the
channels at twice the size ("up").

`regions` of a module are methods that end in a convolution, for `train.recompute=norms`.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.batch_norm import BatchNorm2d
from pipeline.nn.layers import Conv2d, DepthwiseConv2d, SqueezeExcitation, WNConv2d

Resize = Literal["same", "down", "up"]

BRANCH_SCALE = 0.1


class BNSwishConv(nn.Module):
    """Batch norm, swish, nearest upsampling (resize "up" only), weight-normalized 3x3 convolution."""

    regions = ("forward",)

    def __init__(self, channels: int, out_channels: int, resize: Resize, dilation: int = 1):
        super().__init__()
        self.resize = resize
        self.bn_swish = BatchNorm2d(channels, activation=F.silu)
        stride = 2 if resize == "down" else 1
        self.conv = WNConv2d(channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_swish(x)
        return self.conv(upsample(x) if self.resize == "up" else x)


class BNELUConv(nn.Module):
    """Batch norm, ELU, nearest upsampling (resize "up" only), weight-normalized 3x3 convolution."""

    regions = ("forward",)

    def __init__(self, channels: int, out_channels: int, resize: Resize):
        super().__init__()
        self.resize = resize
        self.bn_elu = BatchNorm2d(channels, activation=F.elu)
        self.conv = WNConv2d(channels, out_channels, 3, stride=2 if resize == "down" else 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_elu(x)
        return self.conv(upsample(x) if self.resize == "up" else x)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection (Sandler et al. 2018). No weight norm, no biases.

    An "up" cell upsamples with nearest neighbors just before the depthwise convolution. The paper upsamples first. The
    function is the same, but batch norm, 1x1 convolution and swish would then compute every pixel four times.
    """

    regions = ("_expanded", "_filtered", "_projected")

    def __init__(self, channels, out_channels, resize: Resize, expansion: int, kernel: int = 5, group_width: int = 1):
        super().__init__()
        self.resize = resize
        hidden, copies = channels * expansion, 4 if resize == "up" else 1
        self.bn_in = BatchNorm2d(channels, copies=copies)
        self.expand = Conv2d(channels, hidden, 1, bias=False)
        self.bn_expand = BatchNorm2d(hidden, activation=F.silu, copies=copies)
        self.depthwise = _spatial_conv(hidden, kernel, 2 if resize == "down" else 1, group_width)
        self.bn_depthwise = BatchNorm2d(hidden, activation=F.silu)
        self.project = Conv2d(hidden, out_channels, 1, bias=False)
        self.bn_out = BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_out(self._projected(self._filtered(self._expanded(x))))

    def _expanded(self, x: Tensor) -> Tensor:
        return self.expand(self.bn_in(x))  # (B, hidden, H, W)

    def _filtered(self, h: Tensor) -> Tensor:
        h = self.bn_expand(h)
        return self.depthwise(upsample(h) if self.resize == "up" else h)  # (B, hidden, 2H, 2W) in an "up" cell

    def _projected(self, h: Tensor) -> Tensor:
        return self.project(self.bn_depthwise(h))


def _spatial_conv(channels: int, kernel: int, stride: int, group_width: int) -> nn.Module:
    """Convolution in groups of `group_width` channels; depthwise if that is 1."""
    if stride == group_width == 1:
        return DepthwiseConv2d(channels, kernel)
    groups = channels // group_width
    return Conv2d(channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class FactorizedReduce(nn.Module):
    """Swish, then (B, C, H, W) -> (B, C', H/2, W/2): one 1x1 convolution for each of the four pixels of 2x2 squares."""

    TAPS = ((0, 0), (1, 1), (0, 1), (1, 0))
    """(row, column) inside the square for each convolution."""
    regions = ("forward",)

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        quarter = out_channels // 4
        widths = [quarter, quarter, quarter, out_channels - 3 * quarter]
        self.convs = nn.ModuleList(WNConv2d(channels, width, 1, stride=2) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self._at_tap(conv, tap) for conv, tap in zip(self.convs, self.TAPS, strict=True)])
        bias = torch.cat([conv.current_bias() for conv in self.convs])
        return F.conv2d(F.silu(x), weight, bias, stride=2)  # one 2x2 convolution instead of four 1x1

    @staticmethod
    def _at_tap(conv: WNConv2d, tap: tuple[int, int]) -> Tensor:
        """The 1x1 kernel as a 2x2 kernel that is zero at the other taps."""
        row, column = tap
        return F.pad(conv.current_weight(), (column, 1 - column, row, 1 - row))


class UpsampleProject(nn.Module):
    """Bilinear x2 upsampling (align_corners) and a weight-normalized 1x1 convolution without bias.

    The two commute. The convolution comes first, on a quarter of the pixels.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = WNConv2d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=2, mode="bilinear", align_corners=True)


class ResidualCell(nn.Module):
    """skip(x) + 0.1 * SE(branch(x))."""

    def __init__(self, channels: int, resize: Resize, branch: "BranchFactory", squeeze_excitation: bool):
        super().__init__()
        self.out_channels = out_channels = resized_channels(channels, resize)
        self.skip = self._build_skip(channels, out_channels, resize)
        self.branch = nn.Sequential(*branch(channels, out_channels, resize))
        self.se = SqueezeExcitation(out_channels) if squeeze_excitation else None

    @staticmethod
    def _build_skip(channels: int, out_channels: int, resize: Resize) -> nn.Module | None:
        if resize == "same":
            return None
        return (FactorizedReduce if resize == "down" else UpsampleProject)(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        skip = x if self.skip is None else self.skip(x)
        if self.se is None:
            return torch.add(skip, branch, alpha=BRANCH_SCALE)
        return torch.addcmul(skip, branch, self.se(branch), value=BRANCH_SCALE)


def upsample(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W) with nearest neighbors."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def resized_channels(channels: int, resize: Resize) -> int:
    """Output channels of a cell."""
    return {"same": channels, "down": 2 * channels, "up": channels // 2}[resize]


# ---- architectures: the branch of each kind of cell -----------------------------------------------------------------

BranchFactory = Callable[[int, int, Resize], list[nn.Module]]
"""(channels, out_channels, resize) -> the modules of the branch, in order."""


def two_convs(channels, out_channels, resize, op=BNSwishConv, dilations=(1, 1)) -> list[nn.Module]:
    """Two 3x3 convolutions. The first resizes."""
    extra = [{} if dilation == 1 else {"dilation": dilation} for dilation in dilations]
    return [op(channels, out_channels, resize, **extra[0]), op(out_channels, out_channels, "same", **extra[1])]


def inverted(channels, out_channels, resize, expansion, kernel=5, groups=None) -> list[nn.Module]:
    """One inverted residual. `groups`: of the spatial convolution; depthwise if None.

    Raises ValueError for channels that cannot be divided into these groups.
    """
    hidden = channels * expansion
    if groups is not None and hidden % groups:
        raise ValueError(
            f"model.cells: {hidden} channels ({expansion} times {channels}) cannot be divided into {groups} groups; "
            f"model.encoder_channels and model.decoder_channels must be multiples of {groups}"
        )
    group_width = 1 if groups is None else hidden // groups
    return [InvertedResidual(channels, out_channels, resize, expansion, kernel, group_width)]


def _cells(preprocess, encoder, decoder, postprocess) -> dict[str, BranchFactory]:
    return {"preprocess": preprocess, "encoder": encoder, "decoder": decoder, "postprocess": postprocess}


_e3, _e6 = partial(inverted, expansion=3), partial(inverted, expansion=6)
_e3_grouped = partial(inverted, expansion=3, groups=8)
_elu = partial(two_convs, op=BNELUConv)
_dilated = {name: partial(two_convs, dilations=d) for name, d in (("53", (2, 1)), ("35", (1, 2)), ("55", (2, 2)))}

CELLS: dict[str, dict[str, BranchFactory]] = {
    "res_mbconv": _cells(two_convs, two_convs, _e6, _e3),
    "res_bnswish": _cells(two_convs, two_convs, two_convs, two_convs),
    "res_bnelu": _cells(_elu, _elu, _elu, _elu),
    "mbconv_sep": _cells(_e3, _e6, _e6, _e3),
    "mbconv_sep11": _cells(_e3, partial(_e6, kernel=11), partial(_e6, kernel=11), _e3),
    "mbconv_res": _cells(_e3, _e6, two_convs, two_convs),
    "mbconv_den": _cells(_e3_grouped, _e6, _e6, _e3_grouped),
    "res53_mbconv": _cells(_dilated["53"], _dilated["53"], _e6, _e3),
    "res35_mbconv": _cells(_dilated["35"], _dilated["35"], _e6, _e3),
    "res55_mbconv": _cells(_dilated["55"], _dilated["55"], _e6, _e3),
}
"""The branches of the four kinds of cell, by the architecture names of the reference release. The paper uses
`res_mbconv`."""
