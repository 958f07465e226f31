"""Text around a grid of images: a caption, and labels of its columns and rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.evaluation.images import image_grid

LARGEST, SMALLEST = 13, 8
"""Pixels. Sizes of the text; the largest at which every column's label is narrower than its column."""
MARGIN = 5
"""Pixels around every text."""


class Labels(NamedTuple):
    """Texts in black on white. A label may have several lines."""

    columns: Sequence[str] = ()
    """One above each column, or none at all."""
    rows: Sequence[str] = ()
    """One to the left of each row, or none at all."""
    caption: str = ""
    """Above the picture."""


class LabeledImages(NamedTuple):
    """A grid of images with a label for each column."""

    images: Tensor
    """(n, C, H, W) row by row, as for `image_grid`."""
    labels: Labels

    def picture(self) -> np.ndarray:
        """uint8 (height, width, 3)."""
        return labeled(image_grid(self.images, len(self.labels.columns)), self.labels)


def labeled(grid: np.ndarray, labels: Labels) -> np.ndarray:
    """A grid (height, width, 3), uint8, as `image_grid` gives it, with text around it: uint8, larger.

    The rows and columns of the grid are taken to be as many as their labels.
    """
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    font = _font(draw, labels.columns, grid.shape[1] / max(1, len(labels.columns)))
    sizes = [[_size(draw, text, font) for text in texts] for texts in (labels.rows, labels.columns, [labels.caption])]
    (left, _), (_, above), (caption_width, caption) = (np.array([(0, 0), *of_texts]).max(0) for of_texts in sizes)
    top = above + caption
    width = max(left + grid.shape[1], caption_width)
    page = Image.new("RGB", (int(width), int(top + grid.shape[0])), "white")
    page.paste(Image.fromarray(grid), (int(left), int(top)))
    draw = ImageDraw.Draw(page)
    draw.multiline_text((MARGIN, MARGIN), labels.caption, "black", font)
    for middle, text in zip(_middles(grid.shape[1], labels.columns), labels.columns, strict=True):
        draw.multiline_text((left + middle, top - MARGIN), text, "black", font, anchor="md", align="center")
    for middle, text in zip(_middles(grid.shape[0], labels.rows), labels.rows, strict=True):
        draw.multiline_text((left - MARGIN, top + middle), text, "black", font, anchor="rm", align="right")
    return np.array(page)


def _middles(length: int, labels: Sequence[str]) -> list[float]:
    return [length * (i + 0.5) / len(labels) for i in range(len(labels))]


def _font(draw: ImageDraw.ImageDraw, labels: Sequence[str], width: float) -> ImageFont.FreeTypeFont:
    for size in range(LARGEST, SMALLEST, -1):
        font = ImageFont.load_default(size)
        if all(_size(draw, text, font)[0] - MARGIN <= width for text in labels):
            return font
    return ImageFont.load_default(SMALLEST)


def _size(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """(width, height) with margins; (0, 0) of no text."""
    if not text:
        return 0, 0
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font)
    return int(right) + 2 * MARGIN, int(bottom) + 2 * MARGIN
