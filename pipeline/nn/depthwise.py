"""Depthwise convolution with a faster weight gradient on CPU.

On CPU, torch's gradient with respect to depthwise weights takes about ten times as long as the forward pass. It was the
most expensive single operation of a training step. The same sums can be computed as a forward convolution of each image
with the output's gradient as kernel, which takes half the time or less.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def depthwise_conv2d(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """x (B, C, H, W), weight (C, 1, k, k) -> (B, C, H', W') at stride 1, with one kernel per channel.

    The faster gradient is used for float32 in channels_last on CPU, where the result is then differentiable only once.
    In all other cases this is torch's convolution.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    float32_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if channels_last and float32_on_cpu and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
        return _DepthwiseOnCPU.apply(x, weight, padding)
    return F.conv2d(x, weight, padding=padding, groups=x.shape[1])


class _DepthwiseOnCPU(Function):
    @staticmethod
    def forward(ctx, x, weight, padding):
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, padding=padding, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = _input_gradient(x, weight, dy, ctx.padding) if ctx.needs_input_grad[0] else None
        dweight = _weight_gradient(x, dy, ctx.padding) if ctx.needs_input_grad[1] else None
        return dx, dweight, None


def _input_gradient(x: Tensor, weight: Tensor, dy: Tensor, padding: int) -> Tensor:
    """(B, C, H, W). torch.nn.grad.conv2d_input would be slow: it ignores that x is channels_last."""
    geometry = {"stride": [1, 1], "padding": [padding] * 2, "dilation": [1, 1], "groups": x.shape[1]}
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, **geometry, transposed=False, output_padding=[0, 0], output_mask=[True, False, False]
    )[0]


def _weight_gradient(x: Tensor, dy: Tensor, padding: int) -> Tensor:
    """(C, 1, k, k): the correlation of x with dy for each channel, summed over the images."""
    kernels = dy.unsqueeze(2)  # (B, C, 1, H', W')
    total = F.conv2d(x[:1], kernels[0], padding=padding, groups=x.shape[1])  # (1, C, k, k)
    for image, kernel in zip(x[1:].split(1), kernels[1:], strict=True):
        total += F.conv2d(image, kernel, padding=padding, groups=x.shape[1])
    correlation = total.transpose(0, 1)
    return torch.empty(correlation.shape).copy_(correlation)  # DDP compares its strides with the weight's
