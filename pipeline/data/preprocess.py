"""Between the shard and the model: flip, binarize and pad on the CPU, scaling to [0, 1] on the device.

Random choices depend on (seed, epoch, index) alone, so a sample is the same on every rank, in every worker and after a
resume.
"""

from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.data.random_hash import GOLDEN_GAMMA, Stream, hash64, mix64

Binarize = Literal["none", "dynamic", "fixed"]

MAX_RANDOM = np.uint32(2**32 - 2)
THRESHOLD_STEP = np.uint32((2**32 - 1) // 255)  # nothing is lost: 255 divides 2^32 - 1


class Preprocess:
    """Images as stored -> images as the model gets them, before scaling.

    `flip`: mirror left and right with probability 1/2. `binarize`: "dynamic" makes a value v 255 with probability
    v / 255 and otherwise 0, sampled again in each epoch (Burda et al. 2016, "Importance weighted autoencoders",
    section 5); "fixed" and "none" leave the values as they are. `pad`: black pixels on each side. Evaluation uses
    epoch 0, so it sees the same pixels each time; further epochs are further binarizations.
    """

    def __init__(self, seed: int, flip: bool = False, binarize: Binarize = "none", pad: int = 0):
        self.seed = seed
        self.flip = flip
        self.binarize = binarize
        self.pad = pad

    def __call__(self, images: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """(n, H, W, C) uint8 with epochs and indices (n,) -> (n, C, H + 2 pad, W + 2 pad) uint8, C-contiguous."""
        n, height, width, channels = images.shape
        if self.binarize == "dynamic":
            images = self._binarized(images, epochs, indices)
        pad = self.pad
        out = np.zeros((n, channels, height + 2 * pad, width + 2 * pad), np.uint8)
        out[:, :, pad : pad + height, pad : pad + width] = images.transpose(0, 3, 1, 2)
        if self.flip:
            mirrored = hash64(self.seed, Stream.FLIP, epochs, indices) >> np.uint64(63) == 1
            out[mirrored] = out[mirrored, :, :, ::-1]
        return out

    def _binarized(self, images: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Uses 32 random bits per value, two values from each number of the sample's own SplitMix64 sequence."""
        size = prod(images.shape[1:])
        states = hash64(self.seed, Stream.BINARIZE, epochs, indices)[:, None]  # (n, 1)
        steps = np.arange(1, (size + 1) // 2 + 1, dtype=np.uint64) * GOLDEN_GAMMA
        random = mix64(states + steps).astype("<u8", copy=False).view("<u4")[:, :size]  # (n, H W C)
        on = turns_on(random, images.reshape(len(images), size))
        return (on * np.uint8(255)).reshape(images.shape)


def turns_on(random: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether pixels of these values (uint8) turn white for these random integers (uint32): with probability
    value / 255.

    An integer in 0 .. 2^32 - 2 (2^32 - 1 counts as the one before it) is compared with value (2^32 - 1) / 255, which is
    an integer. So 0 never turns white, 255 always does, and the error of any other probability is below 2^-32.
    """
    return np.minimum(random, MAX_RANDOM) < values * THRESHOLD_STEP


def to_model_input(images: Tensor, bits: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images of any shape -> `dtype` in [0, 1], on the images' device: floor(x / 2^(8 - bits)) / (2^bits - 1).

    The reference's x <- floor(x 255 / 2^(8 - bits)) / (2^bits - 1) of x in [0, 1] gives the same values.
    """
    levels = images >> (8 - bits) if bits < 8 else images
    # A tensor as divisor: CUDA multiplies by the reciprocal of a Python number, which rounds differently.
    return levels.to(dtype) / torch.full((), 2**bits - 1, dtype=dtype, device=images.device)
