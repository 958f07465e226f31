"""Weights prepared once per pass: the same numbers and gradients as layers that prepare their own."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.base import use_channels_last
from pipeline.models.noise import draw_noise
from pipeline.models.nvae import NVAE
from pipeline.nn import weight_cache
from pipeline.nn.layers import (
    Conv2d,
    DepthwiseConv2d,
    Linear,
    MaskedWNConv2d,
    WeightStack,
    WNConv2d,
    cached_in,
    cached_layers,
    caching,
)
from pipeline.nn.weight_cache import WeightCache
from tests.helpers.nvae_cases import NVAE_VARIANTS, build_nvae


def various_layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        [WNConv2d(4, 6, 3), WNConv2d(4, 6, 3, bias=False), MaskedWNConv2d(6, 6, 5, groups=6), Conv2d(4, 6, 3)]
        + [Conv2d(4, 6, 1, bias=False), DepthwiseConv2d(4, 3), Linear(4, 6), Linear(4, 6, bias=False)]
    )


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_nothing_is_cached(module: nn.Module) -> None:
    assert all(entry.weight is None and entry.bias is None for entry in cached_in(cached_layers(module)))


def test_weights_are_cached_inside_the_block_only():
    convs = various_layers().double()
    conv, x = convs[0], images(2, 4, 8, 8).double()
    before = conv(x)
    with WeightCache(convs).prepared():
        cached = conv.cached_weight
        torch.testing.assert_close(conv(x), before)
        assert conv.current_weight() is cached
        with pytest.raises(AssertionError, match="already prepared"), WeightCache(convs).prepared():
            pass
        assert conv.cached_weight is cached
    assert_nothing_is_cached(convs)
    with torch.no_grad():
        conv.log_norm.add_(1.0)
    bias = conv.bias[:, None, None]
    torch.testing.assert_close(conv(x) - bias, (before - bias) * torch.e)  # not the former weight


def test_no_weight_stays_cached_after_an_error():
    convs = various_layers()
    with pytest.raises(RuntimeError, match="midway"), WeightCache(convs).prepared():
        raise RuntimeError("midway")
    assert_nothing_is_cached(convs)


def test_what_is_cached_follows_no_grad_and_autocast():
    convs = various_layers()
    with WeightCache(convs).prepared():
        assert all((layer.cached_weight is not None) == isinstance(layer, nn.Conv2d) for layer in convs)
        assert all(layer.cached_bias is None for layer in convs)
    with torch.no_grad(), WeightCache(convs).prepared():
        assert not convs[0].cached_weight.requires_grad
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16), WeightCache(convs).prepared():
            cached = [
                tensor for _, *tensors in cached_in(cached_layers(convs)) for tensor in tensors if tensor is not None
            ]
            assert len(cached) == len(convs) + 3
            assert {(tensor.dtype, tensor.requires_grad) for tensor in cached} == {(torch.bfloat16, grad)}
            assert_nothing_is_cached(copy.deepcopy(various_layers()))


class CountCasts(TorchDispatchMode):
    """Counts casts to bfloat16 of tensors that are parameters or views of them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].untyped_storage().data_ptr() in self.parameters
        return function(*args, **kwargs)


def gradients(model: NVAE, channels_last: bool = True) -> tuple[dict[str, Tensor], int]:
    """The gradients of a pass under autocast, and the number of parameters that it cast alone."""
    if channels_last:
        use_channels_last(model)
    x = torch.rand(2, *model.image_shape, generator=torch.Generator().manual_seed(1))
    noise = draw_noise(model.groups, 0, "cast", range(2))
    condition = torch.eye(2) if model.condition_size else None
    with CountCasts(model) as casts, torch.autocast("cpu", torch.bfloat16):
        loss = -model(x, noise, condition).elbo.mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, casts.count


def cast_of_each_stack(layers, stacks: list[WeightStack], dtype: torch.dtype) -> list[WeightStack]:
    """Of normalized weights; leaves the others and biases to autocast."""
    normalized = [isinstance(stack.convs[0], WNConv2d) for stack in stacks]
    return [
        stack._replace(weights=stack.weights.to(dtype)) if cast else stack
        for cast, stack in zip(normalized, stacks, strict=True)
    ]


@pytest.mark.parametrize("variant", ["default", "flows", "mbconv_sep", "vanilla", "conditional"])
def test_one_cast_of_all_equals_a_cast_of_each(variant, monkeypatch):
    """To the bit, against autocast's own casts, for every parameter."""
    model = build_nvae(condition_size=2) if variant == "conditional" else build_nvae(**NVAE_VARIANTS[variant])
    ours, casts = gradients(copy.deepcopy(model))
    assert casts == 0
    monkeypatch.setattr(weight_cache, "_cache_casts", cast_of_each_stack)
    theirs, casts = gradients(copy.deepcopy(model))
    assert casts > 10
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name


def test_layers_outside_the_loss_get_no_gradient():
    """Normalized ones, which share a computation, get zeros."""
    convs = various_layers()
    with torch.autocast("cpu", torch.bfloat16), WeightCache(convs).prepared():
        convs[3](images(2, 4, 8, 8)).sum().backward()
    with_gradient = {name: parameter.grad for name, parameter in convs.named_parameters() if parameter.grad is not None}
    assert {name for name, gradient in with_gradient.items() if gradient.any()} == {"3.weight", "3.bias"}
    assert all(name.startswith(("0", "1", "2", "3")) for name in with_gradient)


def test_a_pass_can_be_computed_again_after_the_block():
    """With the tensors of the block: same values, and gradients that reach the parameters."""
    convs, x = various_layers(), images(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), WeightCache(convs).prepared():
        first = convs[0](x).sum() + convs[3](x).sum()
        entries = cached_in(cached_layers(convs))
    assert_nothing_is_cached(convs)
    with torch.no_grad():
        convs[0].log_norm.add_(1.0)  # not what is computed with
    with torch.autocast("cpu", torch.bfloat16), caching(entries):
        again = convs[0](x).sum() + convs[3](x).sum()
    assert_nothing_is_cached(convs)
    assert torch.equal(first, again)
    parameters = [convs[0].log_norm, convs[0].bias, convs[3].weight, convs[3].bias]
    for ours, theirs in zip(
        *(torch.autograd.grad(y, parameters, retain_graph=True) for y in (again, first)), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_have_the_strides_of_their_parameters(dtype, shared):
    """Those of dimensions of size 1 too: DDP warns where they differ."""
    model = build_nvae(**NVAE_VARIANTS["flows"])
    use_channels_last(model)
    model.weight_cache.shared = shared
    x = torch.rand(2, *model.image_shape).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(x, draw_noise(model.noise_groups, 0, "train", range(2)))
    penalty = sum(stack.weights.square().sum() for stack in model.weight_cache.stacks()) if shared else 0.0
    (penalty - out.elbo.mean()).backward()
    different = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.stride() != parameter.stride()
    ]
    assert not different
