"""The weights of a model's layers, prepared once per pass.

NVAE has hundreds of normalized convolutions, and a thousand other small weights and biases. Normalizing each weight and
casting each tensor on its own would launch thousands of small kernels per step.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.nn.layers import CachedLayer, Linear, WeightStack, cached_layers, find_convs, weight_stacks
from pipeline.nn.memory_order import with_usual_strides


class ScaleStack(NamedTuple):
    """The scales of batch norms of one width."""

    norms: list[_BatchNorm]
    scales: Tensor
    """(n, C)."""


def scale_stacks(norms: Sequence[_BatchNorm]) -> list[ScaleStack]:
    """The scales of batch norms, stacked where the width is equal."""
    by_width = defaultdict(list)
    for norm in norms:
        by_width[norm.num_features].append(norm)
    return [ScaleStack(of_width, torch.stack([norm.weight for norm in of_width])) for of_width in by_width.values()]


class WeightCache:
    """Prepares the weights of a model's layers for each pass, and shares those of convolutions with the regularizers.

    `shared`: `stacks` may return those of the last training pass. They hold its graph until a backward pass.
    """

    def __init__(self, model: nn.Module):
        self.layers = cached_layers(model)
        self.convs = list(find_convs(model).values())
        self.shared = False
        self.frozen = False
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
        self._kept: tuple[list[WeightStack], list[ScaleStack]] | None = None
        self._kept_version = 0

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}  # a copy of the model has no part in the graph

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Prepare the weights at the start of the block; every call of the layers inside it uses them.

        These are the weights of convolutions, the scales of batch norms and, under autocast, casts of all weights and
        biases of convolutions and linear layers. The parameters must not change inside the block. Blocks do not nest.
        """
        layers = self.layers
        if self.frozen:
            yield
            return
        assert all(layer.cached_weight is None for layer in layers), "the weights of this pass are already prepared"
        stacks, scales = weight_stacks(self.convs), scale_stacks(self.norms)
        self._keep(stacks, scales)
        device = layers[0].weight.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            stacks = _cache_casts(layers, stacks, torch.get_autocast_dtype(device))
        for stack in stacks:
            for conv, weight in zip(stack.convs, stack.unstacked(), strict=True):
                conv.cached_weight = weight
        for norms, scales_of_width in scales:
            for norm, scale in zip(norms, scales_of_width.unbind(0), strict=True):
                norm.cached_weight = scale
        try:
            yield
        finally:
            for layer in layers:
                layer.cached_weight = layer.cached_bias = None

    def freeze(self) -> None:
        """From now on every pass uses the weights of now, which are no parameters any more, and prepares nothing."""
        with torch.no_grad(), self.prepared():
            frozen = [(layer, layer.cached_weight) for layer in self.layers if layer.cached_weight is not None]
        for layer, weight in frozen:
            layer.cached_weight = weight
            layer.freeze()
        self.frozen = True

    def stacks(self) -> list[WeightStack]:
        """The weights that all convolutions apply, differentiable: those of the last training pass, or computed now.

        The former if neither a backward pass nor a change of the parameters came after that pass.
        """
        return self._kept[0] if self._current() else weight_stacks(self.convs)

    def scales(self) -> list[ScaleStack]:
        """The scales of all batch norms, differentiable, as `stacks`."""
        return self._kept[1] if self._current() else scale_stacks(self.norms)

    def _current(self) -> bool:
        return self._kept is not None and self._kept_version == self._version()

    def _keep(self, stacks: list[WeightStack], scales: list[ScaleStack]) -> None:
        """Keeps the stacks of a training pass. Any other pass drops those before it."""
        training = self.layers[0].training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self._kept = (stacks, scales) if self.shared and training else None
        if self._kept is not None:
            self._kept_version = self._version()
            stacks[0].weights.register_hook(lambda gradient: self._drop())

    def _drop(self) -> None:
        """After a backward pass the graph of the stacks cannot be used again."""
        self._kept = None

    def _version(self) -> int:
        """Grows with every change of the parameters behind the stacks."""
        modules = chain(self.convs, self.norms)
        return sum(parameter._version for module in modules for parameter in module.parameters(recurse=False))


def _cache_casts(layers: Sequence[CachedLayer], stacks: Sequence[WeightStack], dtype: torch.dtype) -> list[WeightStack]:
    """Caches casts of all biases and of the weights of linear layers. Returns casts of the stacks."""
    linear = [layer for layer in layers if isinstance(layer, Linear)]
    biased = [layer for layer in layers if layer.bias is not None and not isinstance(layer, _BatchNorm)]
    tensors = (
        [stack.weights for stack in stacks] + [layer.weight for layer in linear] + [layer.bias for layer in biased]
    )
    casts = iter(_CastAll.apply(dtype, *tensors))
    cast_stacks = [stack._replace(weights=next(casts)) for stack in stacks]
    for layer in linear:
        layer.cached_weight = next(casts)
    for layer in biased:
        layer.cached_bias = next(casts)
    return cast_stacks


class _CastAll(Function):
    """(dtype, tensors of one dtype...) -> their casts, in a few kernels, as are the casts of the gradients."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(_cast_all(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        present = [with_usual_strides(gradient) for gradient in gradients if gradient is not None]
        casts = iter(_cast_all(present, ctx.dtype))
        return None, *(None if gradient is None else next(casts) for gradient in gradients)


def _cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if casts:
        torch._foreach_copy_(casts, list(tensors))
    return casts
