"""Stacking tensors in the order of their memory, so that copies are contiguous and the format is kept."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor of four dimensions is in channels_last and not in the contiguous format too."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """A view of (A, B, H, W) with the dimensions in the order of the other's memory: (A, H, W, B) in channels_last."""
    return tensor.permute(0, 2, 3, 1) if is_channels_last(like) else tensor


def stack_in_memory_order(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Tensors (A, B, H, W), stacked contiguously along a new first dimension, in the order of the other's memory."""
    return _Stack.apply(*(in_memory_order(tensor, like) for tensor in tensors))


class _Stack(Function):
    """torch.stack, whose gradients have the usual strides. Differentiable once."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.set_materialize_grads(False)
        ctx.count = len(tensors)
        return torch.stack(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if gradient is None:
            return (None,) * ctx.count
        return with_usual_strides(gradient.contiguous()).unbind(0)


def in_logical_order(stack: Tensor, like: Tensor) -> Tensor:
    """The inverse for stacks: a view (n, A, B, H, W) of what `stack_in_memory_order` made."""
    return stack.permute(0, 1, 4, 2, 3) if is_channels_last(like) else stack


def stack_with_format(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """(n, A, B, H, W), in which every tensor (A, B, H, W) has the other's memory format."""
    return in_logical_order(stack_in_memory_order(tensors, like), like)


def with_usual_strides(tensor: Tensor) -> Tensor:
    """A contiguous tensor whose dimensions of size 1 have the strides of a new tensor: DDP and lists of tensors compare
    strides. Other tensors are returned as they are.
    """
    return tensor.view(-1).view(tensor.shape) if tensor.is_contiguous() else tensor
