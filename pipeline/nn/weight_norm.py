"""Weight normalization of stacks of weights: W = exp(g) V / (||V|| + 1e-5), with one norm per output channel.

Salimans & Kingma 2016, with the logarithm g of the length as the parameter. The gradient is written out, and what has
one value per channel is computed for all stacks at once: with autograd's steps a stack takes twice as many kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

NORM_EPSILON = 1e-5
SMALLEST_NORM = 1e-30  # instead of the zero of a weight of zeros, in a divisor


def normalize_stacks(stacks: Sequence[Tensor], log_norms: Tensor) -> tuple[Tensor, ...]:
    """Normalized weights of each stack V (n, C_out, ...), in its shape.

    `log_norms` (rows,): g of every output channel, in the order of the stacks. Differentiable once.
    """
    return _NormalizeStacks.apply(log_norms, *stacks)


class _NormalizeStacks(Function):
    @staticmethod
    def forward(ctx, log_norms, *stacks):
        norms = torch.cat([stack.flatten(2).norm(dim=2).flatten() for stack in stacks])  # (rows,)
        scales = torch.exp(log_norms) / (norms + NORM_EPSILON)
        ctx.save_for_backward(norms, scales, *stacks)
        ctx.set_materialize_grads(False)
        return tuple(stack * scale for stack, scale in zip(stacks, _by_stack(scales, stacks), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        norms, scales, *stacks = ctx.saved_tensors
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
        return dlog_norms, *dstacks


def _by_stack(values: Tensor, stacks: Sequence[Tensor]) -> list[Tensor]:
    """Values (rows,) as (n, C_out, 1, ...) for each stack."""
    parts = values.split([stack.shape[0] * stack.shape[1] for stack in stacks])
    return [
        part.view(*stack.shape[:2], *(1 for _ in stack.shape[2:])) for part, stack in zip(parts, stacks, strict=True)
    ]
