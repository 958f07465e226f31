"""Grids of images."""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

MIN_SIDE = 64
"""Pixels. Smaller images are enlarged by a whole factor, since 28-pixel digits are hard to see."""


def image_grid(images: Tensor, columns: int) -> np.ndarray:
    """A grid of images (B, C, H, W), uint8 or floating point in [0, 1], row by row: uint8 array (height, width, 3).

    C is 1 or 3. Values outside [0, 1] are clipped; non-finite ones become black. Small images are enlarged by repeating
    pixels. Two black pixels lie between images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {tuple(images.shape)}, which is not (B, 1 or 3, H, W)")
    pixels = enlarged(to_uint8(images.detach()))
    grid = import_torchvision().utils.make_grid(pixels, nrow=columns, padding=2)  # (3, height, width)
    return grid.permute(1, 2, 0).contiguous().numpy()


def reconstruction_grid(originals: Tensor, reconstructions: Tensor, columns: int) -> np.ndarray:
    """Rows of originals (B, C, H, W), each above the row of their reconstructions: uint8 array (height, width, 3)."""
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"originals {tuple(originals.shape)} and reconstructions {tuple(reconstructions.shape)} differ in shape"
        )
    pairs = zip(to_uint8(originals).split(columns), to_uint8(reconstructions).split(columns), strict=True)
    rows = [torch.cat([_fill_row(above, columns), _fill_row(below, columns)]) for above, below in pairs]
    return image_grid(torch.cat(rows), columns)


def to_uint8(images: Tensor) -> Tensor:
    """uint8 on the CPU from uint8, or from floating point in [0, 1] by rounding."""
    if images.dtype == torch.uint8:
        return images.cpu()
    return images.float().nan_to_num(0, 0, 0).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def import_torchvision() -> ModuleType:
    """The torchvision module. Imported on first use, since the import takes a second and only grids need it.

    torchvision's default wheel is built against CUDA. With a CPU-only torch its extension does not load, and the import
    fails with "operator torchvision::nms does not exist", because its Python code refers to operators that only the
    extension declares. Declaring two schemas is enough for everything but `torchvision.io` and `torchvision.ops`, which
    this project does not use.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision
    return torchvision


def enlarged(images: Tensor, side: int = MIN_SIDE) -> Tensor:
    """Images (B, C, H, W) with pixels repeated so that the longer side is at least `side`."""
    factor = max(1, -(-side // max(images.shape[-2:])))
    return images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def _fill_row(images: Tensor, columns: int) -> Tensor:
    """(columns, C, H, W): the last row is filled up with black images, so that pairs are above each other."""
    missing = columns - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
