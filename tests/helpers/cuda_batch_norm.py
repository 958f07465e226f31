"""The five batch norm operators that torch has for CUDA only, for CPU tensors: written in float64 from their formulas.

They insist on what the CUDA kernels insist on: dtypes, shapes and memory layouts.
"""

import torch
from torch import Tensor

SPACE = (0, 2, 3)


def register() -> torch.library.Library:
    """CPU kernels for the operators, as long as the result is alive."""
    library = torch.library.Library("aten", "IMPL")
    for kernel in (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt):
        library.impl(f"batch_norm_{kernel.__name__}", kernel, "CPU")
    return library


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_layout(x)
    wide = x.double()
    var = wide.var(SPACE, correction=0)
    return wide.mean(SPACE).to(accumulated(x)), (var + eps).rsqrt().to(accumulated(x))


def gather_stats_with_counts(x, mean, invstd, running_mean, running_var, momentum, eps, counts):
    world, channels = mean.shape
    assert invstd.shape == mean.shape
    assert counts.shape == (world,)
    assert counts.dtype == running_mean.dtype == running_var.dtype
    assert mean.dtype == invstd.dtype == accumulated(x)
    means, weights = mean.double(), counts.double()[:, None] / counts.sum()
    total = (means * weights).sum(0)
    second_moments = invstd.double() ** -2 - eps + (means - total) ** 2
    var, n = (second_moments * weights).sum(0), counts.double().sum()
    running_mean.copy_((1 - momentum) * running_mean + momentum * total)
    running_var.copy_((1 - momentum) * running_var + momentum * var * n / (n - 1))
    return total.to(mean.dtype), (var + eps).rsqrt().to(mean.dtype)


def elemt(x, weight, bias, mean, invstd, eps):
    check_layout(x)
    assert weight.dtype == bias.dtype == mean.dtype == invstd.dtype == accumulated(x)
    scale = (weight.double() * invstd)[:, None, None]
    y = (x.double() - mean[:, None, None]) * scale + bias[:, None, None]
    return torch.empty_like(x).copy_(y)


def backward_reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
    check_layout(x)
    assert dy.stride() == x.stride()
    assert dy.dtype == x.dtype
    assert input_g
    assert weight_g
    assert bias_g
    sum_dy = dy.double().sum(SPACE)
    sum_dy_xmu = (dy.double() * (x.double() - mean[:, None, None])).sum(SPACE)
    dweight, dbias = (sum_dy_xmu * invstd).to(weight.dtype), sum_dy.to(weight.dtype)
    return sum_dy.to(mean.dtype), sum_dy_xmu.to(mean.dtype), dweight, dbias


def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    assert count.dtype == torch.int32
    assert count.is_contiguous()
    assert sum_dy.is_contiguous()
    assert sum_dy_xmu.is_contiguous()
    n = count.sum().double()
    dy_mean, slope = sum_dy / n, sum_dy_xmu / n * invstd.double() ** 2
    residual = dy.double() - dy_mean[:, None, None] - (x.double() - mean[:, None, None]) * slope[:, None, None]
    return torch.empty_like(x).copy_(residual * (weight * invstd.double())[:, None, None])


def accumulated(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_layout(x: Tensor) -> None:
    assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
