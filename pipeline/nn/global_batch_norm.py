"""Batch normalization by the statistics of all processes: kernels, gradient, and operators for the compiler.

Each process computes statistics of its own share. One collective gathers them (forward), one sums the two reductions
that the gradient needs (backward). Nothing waits for the device. On GPUs the kernels are those of torch's
SyncBatchNorm; its autograd function is not used, because it waits for the device in every layer.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.distributed import collectives

SPACE = (0, 2, 3)  # all dimensions but the channels


class FusedKernels:
    """Kernels that torch has for CUDA only. Statistics in float32 or better, also of bfloat16 inputs.

    `spread` is the inverse standard deviation.
    """

    counts_dtype = torch.int32

    @staticmethod
    def statistics(x, running_mean, running_var, count, copies, momentum, eps):
        gathered = _gather(*torch.batch_norm_stats(x, eps), count)
        means, spreads, counts = gathered.split([x.shape[1], x.shape[1], 1], dim=1)  # (world, C or 1)
        counts = counts[:, 0]
        # With a multiple of the counts, mean and spread are the same, and the running variance gets its factor.
        weights = counts * copies if copies > 1 else counts
        mean, spread = torch.batch_norm_gather_stats_with_counts(
            x, means, spreads, running_mean, running_var, momentum, eps, weights
        )
        return mean, spread, counts.to(torch.int32)

    @staticmethod
    def normalized(x, mean, spread, weight, bias, eps):
        return torch.batch_norm_elemt(x, weight, bias, mean, spread, eps)

    @staticmethod
    def gradients(dy, x, mean, spread, counts, weight, eps):
        *sums, dweight, dbias = torch.batch_norm_backward_reduce(dy, x, mean, spread, weight, True, True, True)
        sums = collectives.all_reduce(torch.cat(sums)).chunk(2)
        return torch.batch_norm_backward_elemt(dy, x, mean, spread, weight, *sums, counts), dweight, dbias


class PlainKernels:
    """The same in plain operations, for CPUs. Statistics in the dtype of the weights. `spread` is the variance."""

    counts_dtype = None  # of the weights

    @staticmethod
    def statistics(x, running_mean, running_var, count, copies, momentum, eps):
        """Local moments are combined around the global mean (Chan et al. 1979): E[x^2] - E[x]^2 would cancel."""
        x = x.to(running_mean.dtype)
        mean = x.mean(SPACE)
        var = (x - _channels(mean)).square().mean(SPACE)  # torch.var_mean is many times slower in channels_last on CPU
        gathered = _gather(mean, var, count)
        means, variances, counts = gathered.split([x.shape[1], x.shape[1], 1], dim=1)  # (world, C or 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (total * copies / (total * copies - 1)), momentum)
        return mean, var, counts.flatten()

    @staticmethod
    def normalized(x, mean, spread, weight, bias, eps):
        return F.batch_norm(x, mean, spread, weight, bias, eps=eps)

    @staticmethod
    def gradients(dy, x, mean, spread, counts, weight, eps):
        inverse_std = torch.rsqrt(spread + eps)
        wide_dy, centered = dy.to(weight.dtype), x.to(weight.dtype) - _channels(mean)
        sums = torch.stack([wide_dy.sum(SPACE), (wide_dy * centered).sum(SPACE)])  # (2, C)
        dbias, dweight = sums[0].clone(), sums[1] * inverse_std
        dy_mean, covariance = collectives.all_reduce(sums) / counts.sum()
        dx = torch.addcmul(
            wide_dy - _channels(dy_mean), centered, _channels(covariance * inverse_std.square()), value=-1
        )
        return (dx * _channels(weight * inverse_std)).to(x.dtype), dweight, dbias


def has_fused_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def kernels_for(x: Tensor) -> type[FusedKernels] | type[PlainKernels]:
    return FusedKernels if has_fused_kernels(x.device) else PlainKernels


def _gather(mean: Tensor, spread: Tensor, count: Tensor) -> Tensor:
    """(world, 2 C + 1)"""
    return collectives.all_gather(torch.cat([mean, spread, count])[None])


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]


# ---- for eager mode: plain functions; for the compiler: operators, which it does not look into ----------------------


def statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, count: Tensor, copies: int, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), spread (C,) and counts (world,) of x (b, C, H, W) over all processes; updates the running ones.

    b may differ between processes. `count` (1,): b * H * W, in the dtype of the running statistics.
    """
    return kernels_for(x).statistics(x, running_mean, running_var, count, copies, momentum, eps)


def normalized(x: Tensor, mean: Tensor, spread: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return kernels_for(x).normalized(x, mean, spread, weight, bias, eps)


def gradients(
    dy: Tensor, x: Tensor, mean: Tensor, spread: Tensor, counts: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (over all processes), weight and bias (of this one), if mean and spread are those of x."""
    return kernels_for(x).gradients(dy, x, mean, spread, counts, weight, eps)


STATISTICS = torch.library.custom_op("nvae::batch_statistics", statistics, mutates_args=("running_mean", "running_var"))
NORMALIZED = torch.library.custom_op("nvae::batch_normalized", normalized, mutates_args=())
GRADIENTS = torch.library.custom_op("nvae::batch_norm_gradients", gradients, mutates_args=())


@STATISTICS.register_fake
def _(x, running_mean, running_var, count, copies, momentum, eps):
    counts_dtype = kernels_for(x).counts_dtype or running_mean.dtype
    counts = running_mean.new_empty(collectives.num_processes(), dtype=counts_dtype)
    return torch.empty_like(running_mean), torch.empty_like(running_mean), counts


@NORMALIZED.register_fake
def _(x, mean, spread, weight, bias, eps):
    return torch.empty_like(x)


@GRADIENTS.register_fake
def _(dy, x, mean, spread, counts, weight, eps):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _run(operator: Callable, function: Callable, *arguments: Any) -> Any:
    """The dispatch of a custom operator takes 30 us, so that it is used in compiled code only."""
    return (operator if torch.compiler.is_compiling() else function)(*arguments)


def global_statistics(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`statistics`, in eager mode and in compiled code."""
    return _run(STATISTICS, statistics, x.detach(), *arguments)


class GlobalBatchNorm(Function):
    """(x, weight, bias, mean, spread, counts, eps) -> normalized x, where mean, spread and counts are the `statistics`
    of x. The gradient takes into account that they depend on x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, spread, counts, eps):
        ctx.save_for_backward(x, weight, mean, spread, counts)
        ctx.eps = eps
        return _run(NORMALIZED, normalized, x, mean, spread, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, spread, counts = ctx.saved_tensors
        dy = dy.contiguous(memory_format=dense_format(x))
        dx, dweight, dbias = _run(GRADIENTS, gradients, dy, x, mean, spread, counts, weight, ctx.eps)
        return dx, dweight, dbias, None, None, None, None


def dense_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
