"""Batch normalization over the batch of all processes, on any device and backend."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.distributed import collectives

MOMENTUM = 0.05
SPACE = (0, 2, 3)  # all dimensions but the channels


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm, optionally followed by an activation. In training, the statistics are over all processes.

    torch's SyncBatchNorm does not support CPU tensors. This layer supports any backend, and its result equals that of
    a single process with the whole batch. With several processes it is differentiable only once.

    `copies`: compute as if every pixel of the input occurred that many times, as after nearest upsampling. This leaves
    the batch's mean and variance as they are, but changes the unbiased running variance.
    """

    def __init__(
        self,
        channels: int,
        activation: Callable[[Tensor], Tensor] | None = None,
        copies: int = 1,
        momentum: float = MOMENTUM,
    ):
        super().__init__(channels, eps=1e-5, momentum=momentum)
        self.activation, self.copies = activation, copies

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalized(x)
        return y if self.activation is None else self.activation(y)

    def _normalized(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        self.num_batches_tracked.add_(1)
        if collectives.num_processes() > 1:
            return self._global(x)
        return self._local(x)

    def _local(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[1]
        running_var = self.running_var
        # F.batch_norm updates with variance * count / (count - 1). With copies the factor is another, applied below.
        if self.copies > 1:
            running_var = torch.zeros_like(running_var)
        y = F.batch_norm(x, self.running_mean, running_var, self.weight, self.bias, True, self.momentum, self.eps)
        if self.copies > 1:
            correction = (count - 1) * self.copies / (count * self.copies - 1)
            self.running_var.mul_(1 - self.momentum).add_(running_var, alpha=correction)
        return y

    def _global(self, x: Tensor) -> Tensor:
        y, mean, var, count = GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps)
        copies = count * self.copies
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (copies / (copies - 1)), self.momentum)
        return y


def keep_collectives_uncompiled() -> None:
    """Exclude the collectives from compilation. Call before compiling a model.

    A decorator would load the compiler at import, which takes a second.
    """
    BatchNorm2d._global = torch.compiler.disable(BatchNorm2d._global)


class GlobalBatchNorm(Function):
    """(x, weight, bias, eps) -> (normalized x, mean, biased variance, count), with moments over all processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean, var, count = global_moments(x.to(weight.dtype))
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), count)
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        wide_dy = dy.to(weight.dtype)
        centered = x.to(weight.dtype) - _channels(mean)
        sums = torch.stack([wide_dy.sum(SPACE), (wide_dy * centered).sum(SPACE)])  # (2, C)
        dbias, dweight = sums[0].clone(), sums[1] * inverse_std
        dy_mean, covariance = collectives.all_reduce(sums) / count
        dx = torch.addcmul(
            wide_dy - _channels(dy_mean), centered, _channels(covariance * inverse_std.square()), value=-1
        )
        return (dx * _channels(weight * inverse_std)).to(x.dtype), dweight, dbias, None


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () of x (b, C, H, W) over all processes. b may differ between them.

    Local moments are combined around the global mean (Chan et al. 1979): E[x^2] - E[x]^2 would cancel.
    """
    mean = x.mean(SPACE)
    var = (x - _channels(mean)).square().mean(SPACE)  # torch.var_mean is many times slower in channels_last on CPU
    local = torch.cat([mean, var, mean.new_full((1,), x.numel() // x.shape[1])])
    gathered = torch.stack(collectives.all_gather(local))
    means, variances, counts = gathered.split([x.shape[1], x.shape[1], 1], dim=1)  # (world, C or 1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    var = ((variances + (means - mean).square()) * counts).sum(0) / count
    return mean, var, count


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]
