"""Picture files: PNG, and animations as GIF or WebP."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, features

from pipeline.storage.atomic import atomic_file

ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
"""Suffixes of animation files."""


def save_png(path: Path | str, grid: np.ndarray) -> None:
    """Writes a uint8 array (height, width, 3). At any time `path` holds a complete picture or does not exist."""
    with atomic_file(Path(path)) as file:
        Image.fromarray(grid).save(file, format="PNG")


def check_animation(path: Path) -> None:
    """Raises ValueError for a WebP file where Pillow was built without WebP."""
    if ANIMATIONS[path.suffix] == "WEBP" and not features.check("webp"):
        raise ValueError(f"{path}: this Pillow was built without WebP; write a .gif")


def save_animation(path: Path, frames: np.ndarray, milliseconds: Sequence[int]) -> None:
    """Writes uint8 frames (n, height, width, C), C 1 or 3, which repeat without end; complete or absent, as a PNG.

    The suffix of `path` chooses the format. WebP is lossless; GIF has at most 256 colors in each frame, so gray frames
    are exact. `milliseconds`: how long each frame is shown. Raises ValueError as `check_animation` does.
    """
    check_animation(path)
    kind = ANIMATIONS[path.suffix]
    first, *others = [Image.fromarray(frame[:, :, 0] if frame.shape[2] == 1 else frame) for frame in frames]
    options = {"lossless": True, "minimize_size": True} if kind == "WEBP" else {}
    with atomic_file(path) as file:
        first.save(
            file, format=kind, save_all=True, append_images=others, duration=list(milliseconds), loop=0, **options
        )
