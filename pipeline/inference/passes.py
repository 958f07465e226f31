"""Large batches in several passes, as large as memory allows on a GPU."""

from collections.abc import Callable
from typing import TypeVar

import torch

IMAGES_PER_PASS = 128
"""On CPUs. Results do not depend on it, except for rounding."""
IMAGES_PER_GPU_PASS = 2048
"""The size that a GPU starts with."""

Part = TypeVar("Part")


def images_per_pass(device: torch.device) -> int:
    """The largest pass on this device."""
    return IMAGES_PER_GPU_PASS if device.type == "cuda" else IMAGES_PER_PASS


def in_passes(work: Callable[[slice], Part], count: int, device: torch.device) -> list[Part]:
    """`work` of consecutive rows of a batch of `count`, in order. Passes that do not fit into memory are halved.

    Raises ValueError for an empty batch, and torch.OutOfMemoryError where one image does not fit.
    """
    if count < 1:
        raise ValueError("no images were given")
    size, start, parts = images_per_pass(device), 0, []
    while start < count:
        here = slice(start, min(start + size, count))
        try:
            parts.append(work(here))
        except torch.OutOfMemoryError:
            if here.stop - here.start == 1:
                raise
            size = (here.stop - here.start) // 2
        else:
            start = here.stop
    return parts
