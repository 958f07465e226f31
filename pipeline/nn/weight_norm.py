"""Weight normalization of stacks of weights: W = exp(g) V / (||V|| + 1e-5), with one norm per output channel.

Salimans & Kingma 2016, with the logarithm g of the length as the parameter. The gradient is written out, and what has
one value per channel is computed for all stacks at once: with autograd's steps a stack takes twice as many kernels.
Backward stacks the weights again, so that no copy of them is kept through the pass.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.nn.memory_order import with_usual_strides

NORM_EPSILON = 1e-5
SMALLEST_NORM = 1e-30  # instead of the zero of a weight of zeros, in a divisor


class RawStack(NamedTuple):
    """Weights V (C_out, ...) of one shape, which are normalized as a stack (n, C_out, ...)."""

    weights: Sequence[Tensor]
    mask: Tensor | None
    """Multiplies each of them before the norm."""


def normalize_stacks(stacks: Sequence[RawStack], log_norms: Tensor) -> tuple[Tensor, ...]:
    """The normalized weights of each stack, (n, C_out, ...).

    `log_norms` (rows,): g of every output channel, in the order of the stacks. Differentiable once.
    """
    masks = [stack.mask for stack in stacks if stack.mask is not None]
    counts = tuple(len(stack.weights) for stack in stacks)
    is_masked = tuple(stack.mask is not None for stack in stacks)
    return _NormalizeStacks.apply(counts, is_masked, log_norms, *masks, *chain.from_iterable(s.weights for s in stacks))


def _stacked(counts: Sequence[int], is_masked: Sequence[bool], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Stacks of so many weights each. `tensors`: the masks, then all weights."""
    tensors = iter(tensors)
    masks = iter(list(islice(tensors, sum(is_masked))))
    stacks = [torch.stack(list(islice(tensors, count))) for count in counts]
    return [stack * next(masks) if masked else stack for stack, masked in zip(stacks, is_masked, strict=True)]


class _NormalizeStacks(Function):
    @staticmethod
    def forward(ctx, counts, is_masked, log_norms, *tensors):
        stacks = _stacked(counts, is_masked, tensors)
        norms = torch.cat([stack.flatten(2).norm(dim=2).flatten() for stack in stacks])  # (rows,)
        scales = torch.exp(log_norms) / (norms + NORM_EPSILON)
        ctx.save_for_backward(norms, scales, *tensors)
        ctx.counts, ctx.is_masked = counts, is_masked
        ctx.set_materialize_grads(False)
        return tuple(stack * scale for stack, scale in zip(stacks, _by_stack(scales, stacks), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        norms, scales, *tensors = ctx.saved_tensors
        stacks = _stacked(ctx.counts, ctx.is_masked, tensors)
        gradients = [
            torch.zeros_like(stack) if gradient is None else gradient
            for gradient, stack in zip(gradients, stacks, strict=True)
        ]
        products = [(dw * v).flatten(2).sum(2).flatten() for dw, v in zip(gradients, stacks, strict=True)]
        dlog_norms = torch.cat(products) * scales  # (rows,): the sum of dW W
        along = dlog_norms / ((norms + NORM_EPSILON) * norms.clamp(min=SMALLEST_NORM))
        dstacks = [
            torch.addcmul(dw * scale, v, ratio, value=-1)
            for dw, v, scale, ratio in zip(
                gradients, stacks, _by_stack(scales, stacks), _by_stack(along, stacks), strict=True
            )
        ]
        masks = iter(tensors)
        dstacks = [d * next(masks) if masked else d for d, masked in zip(dstacks, ctx.is_masked, strict=True)]
        dweights = chain.from_iterable(with_usual_strides(dstack.contiguous()).unbind(0) for dstack in dstacks)
        return None, None, dlog_norms, *(None for _ in range(sum(ctx.is_masked))), *dweights


def _by_stack(values: Tensor, stacks: Sequence[Tensor]) -> list[Tensor]:
    """Values (rows,) as (n, C_out, 1, ...) for each stack."""
    parts = values.split([stack.shape[0] * stack.shape[1] for stack in stacks])
    return [
        part.view(*stack.shape[:2], *(1 for _ in stack.shape[2:])) for part, stack in zip(parts, stacks, strict=True)
    ]
