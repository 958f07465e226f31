"""Convolutions with weight normalization, squeeze-and-excitation, and layers whose weights are prepared once per pass.

The preparation itself: weight_cache.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.depthwise import depthwise_conv2d
from pipeline.nn.memory_order import in_logical_order, in_memory_order, stack_in_memory_order
from pipeline.nn.weight_norm import RawStack, normalize_stacks

INITIAL_NORM_EPSILON = 1e-2


class CachedLayer(nn.Module):
    """A layer with a weight and perhaps a bias, which takes those that `WeightCache` prepared for the pass."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # In the instance from the start: the compiler guards on their presence.
        self.cached_weight: Tensor | None = None
        self.cached_bias: Tensor | None = None

    def freeze(self) -> None:
        """From now on the layer applies the weight that is cached now, in every pass. It cannot be trained."""
        assert self.cached_weight is not None, "there is no cached weight"
        weight = self.cached_weight.detach().clone()
        del self.weight
        self.weight = self.cached_weight = weight

    def current_weight(self) -> Tensor:
        """The weight of this pass: the cached one if there is one, otherwise the parameter."""
        return self.weight if self.cached_weight is None else self.cached_weight

    def current_bias(self) -> Tensor | None:
        """The bias of this pass: the cached one if there is one, otherwise the parameter."""
        return self.bias if self.cached_bias is None else self.cached_bias


class Conv2d(CachedLayer, nn.Conv2d):
    """torch's convolution, with cached weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.current_weight(), self.current_bias())


class Linear(CachedLayer, nn.Linear):
    """torch's linear layer, with cached weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.current_weight(), self.current_bias())


class DepthwiseConv2d(Conv2d):
    """Depthwise convolution at stride 1 without bias. The output has the input's size."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.current_weight(), self.padding[0])


class WNConv2d(Conv2d):
    """Convolution with weight normalization: W = exp(g) V / (||V|| + 1e-5), with one norm per output channel.

    Salimans & Kingma 2016, with the logarithm g of the length as the parameter, initialized to log(||V|| + 0.01).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options):
        super().__init__(in_channels, out_channels, kernel_size, **options)
        norm = self.weight.detach().flatten(1).norm(dim=1)
        self.log_norm = nn.Parameter(torch.log(norm + INITIAL_NORM_EPSILON).view(-1, 1, 1, 1))
        self.register_buffer("mask", None, persistent=False)  # multiplies V before the norm; equal for equal stack_key

    def freeze(self) -> None:
        super().freeze()
        self.log_norm = self.mask = None

    @property
    def stack_key(self) -> tuple:
        """Convolutions of equal key are normalized in one stack."""
        return "normalized", tuple(self.weight.shape)

    def current_weight(self) -> Tensor:
        """The normalized weight: the cached one if there is one, otherwise computed at this call."""
        return self.cached_weight if self.cached_weight is not None else effective_weights([self])[0]


class MaskedWNConv2d(WNConv2d):
    """Weight-normalized convolution that depends only on earlier pixels in raster order (`mirrored`: on later ones).

    The channels have an autoregressive order too: at the center tap, output channel block i depends on input channel
    blocks up to i, or up to i - 1 when `strict`. `mirrored` reverses the spatial order only. The kernel size is odd
    and the output has the input's size.
    """

    def __init__(self, in_channels, out_channels, kernel_size, strict=False, mirrored=False, groups=1, bias=False):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=bias)
        self.strict, self.mirrored = strict, mirrored
        self.mask = causal_mask(in_channels, out_channels, kernel_size, strict, mirrored, groups).to(self.weight)
        norm = (self.weight.detach() * self.mask).flatten(1).norm(dim=1)
        self.log_norm.data.copy_(torch.log(norm + INITIAL_NORM_EPSILON).view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return super().forward(x)
        return depthwise_conv2d(x, self.current_weight(), self.padding[0])

    @property
    def stack_key(self) -> tuple:
        return "masked", tuple(self.weight.shape), self.groups, self.strict, self.mirrored


def causal_mask(in_channels, out_channels, kernel_size, strict, mirrored, groups) -> Tensor:
    """0/1 mask (C_out, C_in / groups, k, k): 1 above the center, to its left, and for some channels at the center."""
    center = kernel_size // 2
    mask = torch.zeros(out_channels, in_channels // groups, kernel_size, kernel_size)
    mask[:, :, :center] = 1
    mask[:, :, center, :center] = 1
    if groups == 1:
        mask[:, :, center, center] = _channel_mask(in_channels, out_channels, strict)
    else:
        assert groups == in_channels == out_channels, "a mask with groups is for depthwise convolutions"
        mask[:, :, center, center] = 0 if strict else 1
    return mask.flip(2, 3) if mirrored else mask


def _channel_mask(in_channels: int, out_channels: int, strict: bool) -> Tensor:
    """(C_out, C_in) in min(C_in, C_out) blocks: each depends on the blocks before it, and on itself unless strict."""
    num_blocks = min(in_channels, out_channels)
    blocks = torch.ones(num_blocks, num_blocks).tril(-1 if strict else 0)
    rows, columns = out_channels // num_blocks, in_channels // num_blocks
    return blocks.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)


def find_convs(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution of the model by name, normalized or plain, in registration order; no linear layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


class WeightStack(NamedTuple):
    """The weights that convolutions of one shape apply: after normalization and mask, if they have them."""

    convs: list[nn.Conv2d]
    weights: Tensor
    """(n, C_out, ...): one weight per convolution, with the other dimensions in memory order."""

    def unstacked(self) -> tuple[Tensor, ...]:
        """The weight (C_out, C_in / groups, k, k) of each convolution, in the memory format of its parameter."""
        return in_logical_order(self.weights, like=self.convs[0].weight).unbind(0)


def weight_stacks(convs: Sequence[nn.Conv2d]) -> list[WeightStack]:
    """The weights that convolutions apply, stacked where shape and kind are equal. Differentiable once."""
    groups = defaultdict(list)
    for conv in convs:
        groups[conv.stack_key if isinstance(conv, WNConv2d) else tuple(conv.weight.shape)].append(conv)
    normalized = [group for group in groups.values() if isinstance(group[0], WNConv2d)]
    plain = [group for group in groups.values() if not isinstance(group[0], WNConv2d)]
    stacks = [WeightStack(group, stack_in_memory_order(_weights(group), like=_like(group))) for group in plain]
    return stacks + (_normalized(normalized) if normalized else [])


def _normalized(groups: list[list[WNConv2d]]) -> list[WeightStack]:
    log_norms = torch.cat([conv.log_norm.flatten() for group in groups for conv in group])
    raw = [
        RawStack(
            [in_memory_order(weight, like=_like(group)) for weight in _weights(group)],
            None if group[0].mask is None else in_memory_order(group[0].mask, like=_like(group)),
        )
        for group in groups
    ]
    return [
        WeightStack(group, weights) for group, weights in zip(groups, normalize_stacks(raw, log_norms), strict=True)
    ]


def _weights(convs: Sequence[nn.Conv2d]) -> list[Tensor]:
    return [conv.weight for conv in convs]


def _like(convs: Sequence[nn.Conv2d]) -> Tensor:
    """A weight in the memory format of all."""
    return convs[0].weight


def effective_weights(convs: Sequence[nn.Conv2d]) -> list[Tensor]:
    """The weight that each convolution applies, after normalization and mask if it has them. Differentiable once."""
    weights = {}
    for stack in weight_stacks(convs):
        weights.update(zip(stack.convs, stack.unstacked(), strict=True))
    return [weights[conv] for conv in convs]


class Cached(NamedTuple):
    """What a layer has cached."""

    layer: CachedLayer
    weight: Tensor | None
    bias: Tensor | None


def cached_layers(module: nn.Module) -> list[CachedLayer]:
    """The layers inside a module whose weights a `WeightCache` prepares."""
    return [layer for layer in module.modules() if isinstance(layer, CachedLayer)]


def cached_in(layers: Iterable[CachedLayer]) -> list[Cached]:
    """What the layers have cached, for `caching`."""
    return [Cached(layer, layer.cached_weight, layer.cached_bias) for layer in layers]


@contextmanager
def caching(entries: Sequence[Cached]) -> Iterator[None]:
    """Inside the block the layers have these tensors cached, as for a recomputation after the pass.

    Afterwards they have again what they had before. The tensors keep their graph.
    """
    before = cached_in(layer for layer, _, _ in entries)
    _install(entries)
    try:
        yield
    finally:
        _install(before)


def _install(entries: Sequence[Cached]) -> None:
    for layer, weight, bias in entries:
        layer.cached_weight, layer.cached_bias = weight, bias


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018): channel gates (B, C, 1, 1) in (0, 1) from the spatial mean."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = Linear(channels, hidden)
        self.excite = Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3))  # (B, C)
        return torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))[:, :, None, None]
