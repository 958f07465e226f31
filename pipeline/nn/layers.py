"""Convolutions with weight normalization, squeeze-and-excitation, and weights that are prepared once per pass.

NVAE has hundreds of normalized convolutions, and a thousand other small weights and biases. Normalizing each weight and
casting each tensor on its own would launch thousands of small kernels per step. `effective_weights` therefore
normalizes all weights of one shape as one stack, and the model enters `cached_weights` once per pass.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.nn.depthwise import depthwise_conv2d

NORM_EPSILON = 1e-5
INITIAL_NORM_EPSILON = 1e-2


class CachedLayer(nn.Module):
    """A layer with a weight and perhaps a bias, which inside `cached_weights` takes those prepared for the pass."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # In the instance from the start: the compiler guards on their presence.
        self.cached_weight: Tensor | None = None
        self.cached_bias: Tensor | None = None

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

    @property
    def stack_key(self) -> tuple:
        """Convolutions of equal key are normalized in one stack."""
        return (tuple(self.weight.shape),)

    def current_weight(self) -> Tensor:
        """The normalized weight: the cached one inside `cached_weights`, otherwise computed at this call."""
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
        return tuple(self.weight.shape), self.groups, self.strict, self.mirrored


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


def effective_weights(convs: Sequence[nn.Module], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The weight that each convolution applies, after normalization and mask if it has them. Differentiable.

    Normalized convolutions of equal shape are stacked: one norm, one scale and, given a `dtype`, one cast per shape.
    """
    weights: list[Tensor] = [conv.weight for conv in convs]
    stacks = defaultdict(list)
    for index, conv in enumerate(convs):
        if isinstance(conv, WNConv2d):
            stacks[conv.stack_key].append(index)
    for indices in stacks.values():
        stack = _normalized_stack([convs[index] for index in indices])
        for index, weight in zip(indices, (stack if dtype is None else stack.to(dtype)).unbind(0), strict=True):
            weights[index] = weight
    return weights


def _normalized_stack(convs: list[WNConv2d]) -> Tensor:
    """Effective weights (n, C_out, C_in / groups, k, k) of convolutions of one `stack_key`, in their memory format."""
    first = convs[0].weight
    channels_last = not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)  # in memory order, so that stacking copies contiguously
    v = torch.stack([conv.weight.permute(order) for conv in convs])
    if convs[0].mask is not None:
        v = v * convs[0].mask.permute(order)
    log_norm = torch.stack([conv.log_norm for conv in convs])
    scale = torch.exp(log_norm) / (v.flatten(2).norm(dim=2)[..., None, None, None] + NORM_EPSILON)
    weights = v * scale
    return weights.permute(0, 1, 4, 2, 3) if channels_last else weights


@contextmanager
def cached_weights(layers: Sequence[CachedLayer]) -> Iterator[None]:
    """Prepare the weights of these layers once, at the start of the block; every call inside it uses them.

    These are the normalized weights and, under autocast, casts of all plain weights and biases. The parameters must not
    change inside the block. Blocks do not nest.
    """
    assert all(layer.cached_weight is None for layer in layers), "cached_weights: the block was entered twice"
    normalized = [layer for layer in layers if isinstance(layer, WNConv2d)]
    device = layers[0].weight.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else layers[0].weight.dtype
    for conv, weight in zip(normalized, effective_weights(normalized, dtype), strict=True):
        conv.cached_weight = weight
    if autocast:
        _cache_casts(layers, dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.cached_weight = layer.cached_bias = None


def _cache_casts(layers: Sequence[CachedLayer], dtype: torch.dtype) -> None:
    """Caches casts of all biases, and of the weights that are not normalized."""
    plain = [layer for layer in layers if not isinstance(layer, WNConv2d)]
    biased = [layer for layer in layers if layer.bias is not None]
    parameters = [layer.weight for layer in plain] + [layer.bias for layer in biased]
    if not parameters:
        return
    casts = _CastAll.apply(dtype, *parameters)
    for layer, weight in zip(plain, casts[: len(plain)], strict=True):
        layer.cached_weight = weight
    for layer, bias in zip(biased, casts[len(plain) :], strict=True):
        layer.cached_bias = bias


class _CastAll(Function):
    """(dtype, tensors of one dtype...) -> their casts, in a few kernels, as are the casts of the gradients."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(_cast_all(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        present = [gradient for gradient in gradients if gradient is not None]
        casts = iter(_cast_all(present, ctx.dtype))
        return None, *(None if gradient is None else next(casts) for gradient in gradients)


def _cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if casts:
        torch._foreach_copy_(casts, list(tensors))
    return casts


class Cached(NamedTuple):
    """What a layer has cached."""

    layer: CachedLayer
    weight: Tensor | None
    bias: Tensor | None


def cached_in(module: nn.Module) -> list[Cached]:
    """What the layers inside a module have cached, for `caching`."""
    layers = [layer for layer in module.modules() if isinstance(layer, CachedLayer)]
    return [Cached(layer, layer.cached_weight, layer.cached_bias) for layer in layers]


@contextmanager
def caching(entries: Sequence[Cached]) -> Iterator[None]:
    """Inside the block the layers have these tensors cached, as for a recomputation after `cached_weights` has ended.

    Afterwards they have again what they had before. The tensors keep their graph.
    """
    before = [Cached(layer, layer.cached_weight, layer.cached_bias) for layer, _, _ in entries]
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
