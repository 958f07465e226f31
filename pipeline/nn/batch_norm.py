"""Batch normalization over the batch of all processes, on any device and backend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed import collectives
from pipeline.nn.global_batch_norm import GlobalBatchNorm, dense_format, global_statistics
from pipeline.nn.layers import CachedLayer

MOMENTUM = 0.05

Moments = tuple[Tensor, Tensor, Tensor]

_counters: dict[int, Tensor] | None = None
"""Inside `counted_at_the_end`: num_batches_tracked of the norms that have run, by identity."""
_recorded: list[Moments] | None = None
_replayed: Iterator[Moments] | None = None


class BatchNorm2d(CachedLayer, nn.BatchNorm2d):
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
        self._kept: tuple[tuple, Tensor] | None = None  # of `_pixels`

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalized(x)
        return y if self.activation is None else self.activation(y)

    def _normalized(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.current_weight(), self.bias, eps=self.eps)
        if _replayed is None:
            _count_pass(self.num_batches_tracked)
        if collectives.num_processes() > 1:
            return self._global(x)
        return self._local(x)

    def _local(self, x: Tensor) -> Tensor:
        if _replayed is not None:
            scratch = torch.empty_like(self.running_mean), torch.empty_like(self.running_var)
            return F.batch_norm(x, *scratch, self.current_weight(), self.bias, True, self.momentum, self.eps)
        count = x.numel() // x.shape[1]
        running_var = self.running_var
        # F.batch_norm updates with variance * count / (count - 1). With copies the factor is another, applied below.
        if self.copies > 1:
            running_var = torch.zeros_like(running_var)
        y = F.batch_norm(
            x, self.running_mean, running_var, self.current_weight(), self.bias, True, self.momentum, self.eps
        )
        if self.copies > 1:
            correction = (count - 1) * self.copies / (count * self.copies - 1)
            self.running_var.mul_(1 - self.momentum).add_(running_var, alpha=correction)
        return y

    def _global(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=dense_format(x))
        moments = self._moments(x) if _replayed is None else next(_replayed)
        if _recorded is not None:
            _recorded.append(moments)
        return GlobalBatchNorm.apply(x, self.current_weight(), self.bias, *moments, self.eps)

    def _moments(self, x: Tensor) -> Moments:
        buffers = self.running_mean, self.running_var
        return global_statistics(x, *buffers, self._pixels(x), self.copies, self.momentum, self.eps)

    def _pixels(self, x: Tensor) -> Tensor:
        """(1,) pixels of a channel. Kept from pass to pass, because a fill is a kernel of its own."""
        count = x.numel() // x.shape[1]
        key = count, x.device, self.weight.dtype
        if torch.compiler.is_compiling():
            return self.weight.new_full((1,), count)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.weight.new_full((1,), count)
        return self._kept[1]


@contextmanager
def counted_at_the_end() -> Iterator[None]:
    """Norms that run in training inside the block are counted (`num_batches_tracked`) in one operation at its end."""
    global _counters
    _counters = {}
    try:
        yield
        if _counters:
            torch._foreach_add_(list(_counters.values()), 1)
    finally:
        _counters = None


def _count_pass(counter: Tensor) -> None:
    if _counters is None or id(counter) in _counters or torch.compiler.is_compiling():
        counter.add_(1)
    else:
        _counters[id(counter)] = counter


@contextmanager
def recording(moments: list[Moments]) -> Iterator[None]:
    """Norms that run in training inside the block append the statistics of all processes that they used."""
    global _recorded
    assert _recorded is _replayed is None, "recomputed regions do not nest"
    _recorded = moments
    try:
        yield
    finally:
        _recorded = None


@contextmanager
def replaying(moments: list[Moments]) -> Iterator[None]:
    """Norms inside the block normalize as they did when `moments` was recorded, and change nothing else.

    With several processes they use the recorded statistics: no collective is repeated. With one they compute theirs
    again, which gives the same result to the bit; normalizing by stored statistics would not.
    """
    global _replayed
    assert _recorded is _replayed is None, "recomputed regions do not nest"
    _replayed = iter(moments)
    try:
        yield
    finally:
        _replayed = None
