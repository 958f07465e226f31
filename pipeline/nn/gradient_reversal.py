"""Gradient reversal (Ganin & Lempitsky 2015, arXiv:1409.7495): one loss, one optimizer, two opposed players."""

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class GradientReversal(Function):
    """The identity, whose gradient is turned round: what comes before it learns to raise the loss that follows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


def reversed_gradient(x: Tensor) -> Tensor:
    """`x`, with its gradient turned round."""
    return GradientReversal.apply(x)
