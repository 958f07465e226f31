"""Features of a set of images that ranks share: their moments, and where metrics need them, the features themselves."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.evaluation.feature_moments import FeatureMoments, Moments
from pipeline.evaluation.inception import Resize, network_input

Rounding = Literal["uint8", "float"]
"""Values of pixels: uint8, rounded to 0 ... 255 as an image file holds them; float, as they are."""

ROWS_SUMMED = 4096
"""Features that ranks exchange at a time."""


class ImageFeatures(NamedTuple):
    """Of n images, the same on every rank."""

    moments: Moments
    rows: Tensor | None
    """(n, d) on the device, in the order of the images; None where only the moments are kept."""


class FeatureCollector:
    """Passes images through the feature network, and adds up what comes out.

    All passes have the same number of images, the last one filled up with zeros: so the features of an image do not
    depend on which others a rank has, and rows are equal on any number of ranks.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        count: int,
        resize: Resize,
        rounding: Rounding,
        keep_rows: bool,
    ):
        """`network`: inputs (B, 3, 299, 299) -> features (B, network.size). `count`: images of all ranks."""
        self.network, self.dtype = network, dtype
        self.resize, self.rounding = resize, rounding
        self.images_per_pass = 128 if device.type == "cuda" else 16
        self.sums = FeatureMoments(network.size, device)
        self.rows = torch.zeros(count, network.size, dtype=dtype, device=device) if keep_rows else None
        self.seen = torch.zeros(count, dtype=torch.float64, device=device)
        self._images: list[Tensor] = []
        self._positions: list[int] = []

    @torch.no_grad()
    def add(self, images: Tensor, positions: Sequence[int]) -> None:
        """Images (b, 1 or 3, H, W) in [0, 1], and their numbers below `count`."""
        self._images += images.to(self.dtype).unbind()
        self._positions += positions
        while len(self._images) >= self.images_per_pass:
            self._pass()

    def _pass(self) -> None:
        """Of the next images."""
        here = slice(self.images_per_pass)
        images, positions = self._images[here], self._positions[here]
        del self._images[here], self._positions[here]
        filling = [torch.zeros_like(images[0])] * (self.images_per_pass - len(images))
        pixels = to_pixels(torch.stack(images + filling), self.rounding)
        features = self.network(network_input(pixels, self.resize))[: len(images)]  # (b, d)
        self.sums.add(features)
        self.seen[positions] = 1
        if self.rows is not None:
            self.rows[positions] = features

    @torch.no_grad()
    def finish(self, total: Callable[[Tensor], Tensor] = lambda values: values) -> ImageFeatures:
        """The features of all ranks, without images that none of them added; `total` sums a tensor over ranks.

        Raises ValueError as `FeatureMoments.reduce` does.
        """
        if self._images:
            self._pass()
        moments = self.sums.reduce(total)
        if self.rows is None:
            return ImageFeatures(moments, None)
        sum_rows(self.rows, total)
        return ImageFeatures(moments, self.rows[total(self.seen) > 0])


def to_pixels(images: Tensor, rounding: Rounding) -> Tensor:
    """Floats in [0, 255] from images in [0, 1]."""
    pixels = images.clamp(0, 1) * 255
    return pixels.round() if rounding == "uint8" else pixels


def sum_rows(rows: Tensor, total: Callable[[Tensor], Tensor]) -> None:
    """Gives every rank the rows (n, d) of all, in place. Those that a rank does not have are zero, so no sum rounds."""
    for part in rows.split(ROWS_SUMMED):
        part.copy_(total(part))
