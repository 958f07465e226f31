"""Covariance of two parts of a latent vector over the batches of all processes."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.distributed import collectives


def cross_covariance(a: Tensor, b: Tensor) -> Tensor:
    """(): half the sum of squared covariances of the columns of a (B, n) with those of b (B, m).

    The XCov penalty of Cheung et al. 2014 (arXiv:1412.6583, eq. 4). The rows of all processes are gathered. The
    value, and the gradient averaged over processes, therefore equal those of one process with the whole batch.
    """
    a, b = gathered_rows(torch.cat([a, b], dim=1)).split([a.shape[1], b.shape[1]], dim=1)
    with torch.autocast(a.device.type, enabled=False):  # bfloat16 has too few digits near 0
        covariance = (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)  # (n, m)
    return covariance.square().sum() / 2


def gathered_rows(x: Tensor) -> Tensor:
    """(world_size * B, n) in rank order, from x (B, n) with the same B on every process. Differentiable once."""
    return GatherRows.apply(x) if collectives.num_processes() > 1 else x


class GatherRows(Function):
    """The loss of each process depends on all rows, so the gradient of a row is the sum over processes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return collectives.all_gather(x.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = collectives.all_reduce(gradient.clone())
        return gradient.chunk(collectives.num_processes())[collectives.process_rank()]
