"""Largest singular values of many matrices by power iteration, in few kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

SMALLEST_NORM = 1e-3  # shorter vectors are not scaled to unit length


def sum_of_singular_values(
    matrices: Sequence[Tensor], u: Sequence[Tensor], iterations: int
) -> tuple[Tensor, list[Tensor]]:
    """The sum of the largest singular values of all matrices (n, R, C), a scalar with gradient, and vectors (n, R).

    The values are lower bounds, by power iteration from the left singular vectors u (n, R). The gradient treats the
    singular vectors as constants. The new left vectors are views of one buffer.
    """
    left, right, total = _power_iteration([stack.detach() for stack in matrices], u, iterations)
    return _WithOuterProducts.apply(total, left, right, *matrices), _rows(left, matrices, dim=1)


def power_iteration(
    matrices: Sequence[Tensor], u: Sequence[Tensor], iterations: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Singular vectors u (n, R) and v (n, C) to the largest singular values of matrices (n, R, C), starting from u."""
    left, right, _ = _power_iteration(matrices, u, iterations)
    return _rows(left, matrices, dim=1), _rows(right, matrices, dim=2)


@torch.no_grad()
def _power_iteration(matrices: Sequence[Tensor], u: Sequence[Tensor], iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right vectors as rows of one buffer each, padded with zeros, and the sum over matrices M of u M v.

    So that all vectors are scaled to unit length at once, whatever their length.
    """
    right, image = _buffer(matrices, dim=2), _buffer(matrices, dim=1)
    rights, images = _rows(right, matrices, dim=2), _rows(image, matrices, dim=1)
    for _ in range(iterations):
        for stack, start, v in zip(matrices, u, rights, strict=True):
            torch.bmm(start.unsqueeze(1), stack, out=v.unsqueeze(1))
        right.div_(_lengths(right))
        for stack, v, mv in zip(matrices, rights, images, strict=True):
            torch.bmm(stack, v.unsqueeze(2), out=mv.unsqueeze(2))
        left = image / _lengths(image)
        u = _rows(left, matrices, dim=1)
    return left, right, (left * image).sum()


def _buffer(matrices: Sequence[Tensor], dim: int) -> Tensor:
    """Zeros (rows, longest): a row for each vector along dimension `dim` of the matrices."""
    return matrices[0].new_zeros(sum(stack.shape[0] for stack in matrices), max(stack.shape[dim] for stack in matrices))


def _rows(buffer: Tensor, matrices: Sequence[Tensor], dim: int) -> list[Tensor]:
    """The vectors (n, R or C) of each stack of matrices: views of the buffer."""
    parts = buffer.split([stack.shape[0] for stack in matrices])
    return [part[:, : stack.shape[dim]] for part, stack in zip(parts, matrices, strict=True)]


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=SMALLEST_NORM)


class _WithOuterProducts(Function):
    """(total, u, v, matrices...) -> total, where the gradient of each matrix is the outer product of its vectors."""

    @staticmethod
    def forward(ctx, total, left, right, *matrices):
        ctx.save_for_backward(left, right)
        ctx.shapes = [torch.empty(stack.shape, device="meta") for stack in matrices]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        left, right = ctx.saved_tensors
        lefts, rights = _rows(left * gradient, ctx.shapes, dim=1), _rows(right, ctx.shapes, dim=2)
        return None, None, None, *(u.unsqueeze(2) * v.unsqueeze(1) for u, v in zip(lefts, rights, strict=True))
