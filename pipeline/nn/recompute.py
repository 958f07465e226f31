"""Activations that are computed again in the backward pass instead of being kept (Chen et al. 2016, arXiv:1604.06174).

A region is a method of a module. Only its inputs are kept. Backward runs it again up to the last activation that it
needs: of a region that ends in a convolution, everything but the convolution.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pipeline.nn.batch_norm import Moments, recording, replaying
from pipeline.nn.layers import cached_in, cached_layers, caching


class Recomputed:
    """A method of a module, to be called in its place. In evaluation and without gradients it is that method.

    The recomputation uses the weights that were cached in the forward pass, and changes no running statistics. The
    method must use no random numbers and have no other side effects.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.method = module, getattr(module, name)
        self.layers = cached_layers(module)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.method(*inputs)
        if torch.compiler.is_compiling():
            return checkpoint(self.method, *inputs, use_reentrant=False, context_fn=keep_statistics)
        return checkpoint(self._region(), *inputs, use_reentrant=False, preserve_rng_state=False)

    def _region(self) -> Callable[..., Tensor]:
        """Runs the method; at its second call as a recomputation of the first."""
        cached = cached_in(self.layers)
        moments: list[Moments] = []
        ran = False

        def run(*inputs: Tensor) -> Tensor:
            nonlocal ran
            mode, ran = (replaying if ran else recording), True
            with caching(cached), mode(moments):
                return self.method(*inputs)

        return run


def keep_statistics() -> tuple[Any, Any]:
    """What the compiler does with the operators of a region: it keeps the results of those with a collective.

    It repeats the others in the backward graph, where the new running statistics are results that nothing uses: the
    buffers are written in the forward graph only.
    """
    return create_selective_checkpoint_contexts([torch.ops.nvae.batch_statistics.default])


def recompute(module: nn.Module, method: str) -> None:
    """From now on this method of the module computes its activations again in the backward pass."""
    setattr(module, method, Recomputed(module, method))
