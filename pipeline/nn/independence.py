"""Covariance of two parts of a latent vector, over the batch of all processes."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.distributed import collectives


def cross_covariance(a: Tensor, b: Tensor) -> Tensor:
    """(): half the sum of squares of the covariances of a (B, n) with b (B, m); 0 where they are uncorrelated.

    The XCov penalty of Cheung et al. 2014 (arXiv:1412.6583, eq. 4). The rows of all processes are gathered, so the
    value, and the gradient after averaging over processes, equal those of one process with the whole batch.
    """
    a, b = gathered_rows(torch.cat([a, b], dim=1)).split([a.shape[1], b.shape[1]], dim=1)
    with torch.autocast(a.device.type, enabled=False):  # bfloat16 is too coarse near 0
        covariance = (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)  # (n, m)
    return covariance.square().sum() / 2


def gathered_rows(x: Tensor) -> Tensor:
    """(world_size * B, n) in rank order, from x (B, n) of equal B on every process. Differentiable once."""
    return GatherRows.apply(x) if collectives.num_processes() > 1 else x


class GatherRows(Function):
    """Each process's loss depends on the rows of all: a row's gradient is the sum over processes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.cat(collectives.all_gather(x.contiguous()))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = collectives.all_reduce(gradient.clone())
        return gradient.chunk(collectives.num_processes())[collectives.process_rank()]
