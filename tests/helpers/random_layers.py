"""Layers with random parameters and buffers, and inputs, in float64."""

import torch
from torch import Tensor, nn


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 with every parameter and running statistic drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.1)
    return module


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
