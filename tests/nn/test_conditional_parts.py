"""Gradient reversal and conditional batch norm, the parts of attribute_vae."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.conditional_norm import ConditionalBatchNorm2d
from pipeline.nn.gradient_reversal import reverse_gradient


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_reversal_is_the_identity_with_the_opposite_slope():
    x = random(4, 3).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return (x.sin() * random(4, 3, seed=5)).sum()

    assert torch.equal(reverse_gradient(x), x)
    function(reverse_gradient(x)).backward()
    step = 1e-6
    for place in [(0, 0), (2, 1), (3, 2)]:
        shift = torch.zeros_like(x)
        shift[place] = step
        slope = (function(x + shift) - function(x - shift)) / (2 * step)
        assert x.grad[place].item() == pytest.approx(-slope.item(), abs=1e-8)


def test_a_fresh_conditional_norm_is_batch_norm():
    norm, plain = ConditionalBatchNorm2d(4, 3).double(), nn.BatchNorm2d(4, momentum=0.05).double()
    x, condition = random(5, 4, 2, 3), random(5, 3)
    torch.testing.assert_close(norm(x, condition), plain(x))
    torch.testing.assert_close(norm.eval()(x, condition), plain.eval()(x))


def test_conditional_norm_scales_and_shifts_each_image_by_its_condition():
    norm = ConditionalBatchNorm2d(4, 3).double()
    with torch.no_grad():
        norm.modulation.weight.copy_(random(8, 3))
    x, condition = random(5, 4, 2, 3), random(5, 3, seed=2)
    normal = F.batch_norm(x, None, None, training=True)
    expected = torch.empty_like(x)
    for image in range(5):
        for channel in range(4):
            scale = 1 + norm.modulation.weight[channel] @ condition[image]
            shift = norm.modulation.weight[4 + channel] @ condition[image]
            expected[image, channel] = scale * normal[image, channel] + shift
    torch.testing.assert_close(norm(x, condition), expected)
