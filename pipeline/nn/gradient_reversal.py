"""Gradient reversal (Ganin & Lempitsky 2015, arXiv:1409.7495): adversarial training with one loss and optimizer."""

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class GradientReversal(Function):
    """The identity in the forward pass; negates the gradient, so that the layers before it maximize the loss."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


def reverse_gradient(x: Tensor) -> Tensor:
    """`x`, with its gradient negated."""
    return GradientReversal.apply(x)
