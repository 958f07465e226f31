"""Model FLOPs utilization: the share of the device's peak that training reaches."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.base import VAE

BF16_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
"""Dense bfloat16 FLOP/s with float32 accumulation, from the makers' data sheets, by a part of the device's name."""


def step_flops(model: VAE, batch_size: int) -> int:
    """Floating-point operations of a training step's convolutions and products.

    One forward pass, and twice that for backward. `model` is on the meta device, where nothing is computed.
    """
    x = torch.empty(1, *model.image_shape, device="meta")
    noise = [torch.empty(1, *group.shape, device="meta") for group in model.noise_groups]
    condition = torch.empty(1, model.condition_size, device="meta") if model.condition_size else None
    with FlopCounterMode(display=False) as counter:
        model.eval()(x, noise, condition)
    return 3 * batch_size * counter.get_total_flops()


def peak_flops(device_name: str, precision: str) -> float | None:
    """The device's peak in FLOP/s; None if unknown."""
    if precision != "bf16":
        return None
    return next((peak for part, peak in BF16_PEAKS.items() if part in device_name), None)
