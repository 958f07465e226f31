"""Latent noise as a pure function of (seed, stream, position).

Each sample's noise comes from a generator seeded for that sample alone. It does not depend on rank, world size,
micro-batch or earlier random numbers, and a checkpoint holds no generator state.
"""

import hashlib
from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from pipeline.models.base import LatentGroup


def sample_seed(seed: int, stream: str, position: int) -> int:
    """A 63-bit generator seed for one sample: equal arguments give equal seeds on every machine."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_noise(
    groups: Sequence[LatentGroup],
    seed: int,
    stream: str,
    positions: Iterable[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Standard normal noise, one tensor (B, *group.shape) per group, for the samples at `positions`.

    `stream` names the use ("train", "validate", "sample 0.7"); different streams are independent. Values are sampled in
    float32 and then cast to `dtype`, so a float64 run has the noise of a float32 run on the same kind of device. CPU
    and CUDA generators differ.
    """
    positions = [int(position) for position in positions]
    sizes = [prod(group.shape) for group in groups]
    flat = torch.empty(len(positions), sum(sizes), device=device)  # (B, total)
    generator = torch.Generator(device=device)
    for row, position in zip(flat, positions, strict=True):
        generator.manual_seed(sample_seed(seed, stream, position))
        row.normal_(generator=generator)
    parts = flat.to(dtype).split(sizes, dim=1)
    return [part.reshape(-1, *group.shape) for part, group in zip(parts, groups, strict=True)]
