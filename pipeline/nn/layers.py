"""Convolutions with weight normalisation, and squeeze-excitation.

A network with hundreds of normalised convolutions spends much of a small step on tiny kernels, so the effective
weights of all of them are computed together, stacked by shape: `effective_weights`. A model wraps each of its passes
in `normalized_once`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.depthwise import depthwise_conv2d

NORM_EPSILON = 1e-5
INITIAL_NORM_EPSILON = 1e-2


class WNConv2d(nn.Conv2d):
    """Convolution whose filters have a learned length: W = exp(g) V / (||V|| + 1e-5), the norm per output channel.

    (Salimans & Kingma 2016, with the length kept as its logarithm.) At the start ||W|| is about ||V|| + 0.01.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options):
        super().__init__(in_channels, out_channels, kernel_size, **options)
        norm = self.weight.detach().flatten(1).norm(dim=1)
        self.log_norm = nn.Parameter(torch.log(norm + INITIAL_NORM_EPSILON).view(-1, 1, 1, 1))
        self.register_buffer("mask", None, persistent=False)  # multiplies V before the norm; one for each `stack_key`
        self.handed_weight: Tensor | None = None  # set by `normalized_once` for the time of one pass

    @property
    def stack_key(self) -> tuple:
        """Convolutions of equal key are normalised in one stack."""
        return (tuple(self.weight.shape),)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.current_weight(), self.bias)

    def current_weight(self) -> Tensor:
        """The weight handed over for this pass, else this layer's own effective weight."""
        return self.handed_weight if self.handed_weight is not None else effective_weights([self])[0]


class MaskedWNConv2d(WNConv2d):
    """Weight-normalised convolution that sees only earlier pixels in raster order (later ones when mirrored).

    At the centre tap, output channel block i sees input channel blocks up to i, without i itself when `strict`: an
    autoregressive order of the channels too. Mirroring turns the spatial order only. Kernel odd, padded to the same
    size.
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
    """0/1 mask (C_out, C_in / groups, k, k): rows above the centre, left of it in its row, part of the centre tap."""
    centre = kernel_size // 2
    mask = torch.zeros(out_channels, in_channels // groups, kernel_size, kernel_size)
    mask[:, :, :centre] = 1
    mask[:, :, centre, :centre] = 1
    if groups == 1:
        mask[:, :, centre, centre] = _channel_mask(in_channels, out_channels, strict)
    else:
        assert groups == in_channels == out_channels, "grouped masks are made for depthwise convolutions"
        mask[:, :, centre, centre] = 0 if strict else 1
    return mask.flip(2, 3) if mirrored else mask


def _channel_mask(in_channels: int, out_channels: int, strict: bool) -> Tensor:
    """(C_out, C_in): of min(C_in, C_out) blocks of channels, each sees those before it, and itself unless strict."""
    num_blocks = min(in_channels, out_channels)
    blocks = torch.ones(num_blocks, num_blocks).tril(-1 if strict else 0)
    rows, columns = out_channels // num_blocks, in_channels // num_blocks
    return blocks.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)


def find_convs(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution of the model by name, normalised or plain, in registration order; no linear layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def effective_weights(convs: Sequence[nn.Module], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The weight that each convolution applies, normalised and masked where it is, differentiable.

    Normalised convolutions of equal shape are stacked: one norm, one scale and, given a `dtype`, one cast per shape.
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
    """Effective weights (n, C_out, C_in / groups, k, k) of convolutions of one `stack_key`, memory format kept."""
    first = convs[0].weight
    channels_last = not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)  # stacking dense tensors is one plain copy each
    v = torch.stack([conv.weight.permute(order) for conv in convs])
    if convs[0].mask is not None:
        v = v * convs[0].mask.permute(order)
    log_norm = torch.stack([conv.log_norm for conv in convs])
    scale = torch.exp(log_norm) / (v.flatten(2).norm(dim=2)[..., None, None, None] + NORM_EPSILON)
    weights = v * scale
    return weights.permute(0, 1, 4, 2, 3) if channels_last else weights


@contextmanager
def normalized_once(convs: Sequence[WNConv2d]) -> Iterator[None]:
    """Within the block every one of these convolutions uses a weight computed at its start, all of them at once.

    For one pass of the model over unchanged parameters; outside, each computes its own at every call. A block within a
    block changes nothing.
    """
    if convs[0].handed_weight is not None:
        yield
        return
    device = convs[0].weight.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else convs[0].weight.dtype
    for conv, weight in zip(convs, effective_weights(convs, dtype), strict=True):
        conv.handed_weight = weight
    try:
        yield
    finally:
        for conv in convs:
            conv.handed_weight = None


class SqueezeExcitation(nn.Module):
    """Channel gates (B, C, 1, 1) in (0, 1) from the spatial mean (Hu et al. 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3))  # (B, C)
        return torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))[:, :, None, None]
