"""A blur for images that a frozen network looks at."""

import torch.nn.functional as F
from torch import Tensor


def binomial_blur(x: Tensor) -> Tensor:
    """Images (B, C, H, W) filtered twice with [1, 2, 1] / 4 along both axes; at the edges, pixels repeat.

    Together that is [1, 4, 6, 4, 1] / 16: nothing with a period of two pixels passes, and 1/16 of one of three.
    Computed as means of pairs, which have a deterministic gradient on GPUs; padding by repetition does not.
    """
    for _ in range(2):
        x = F.avg_pool2d(x, 2, stride=1, padding=1, count_include_pad=False)  # (B, C, H + 1, W + 1)
        x = F.avg_pool2d(x, 2, stride=1)
    return x
