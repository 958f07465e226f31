"""The pictures that sample.py and edit.py write, taken apart."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def pixels(path: str | Path) -> torch.Tensor:
    """uint8 (1, 3, H, W)."""
    return torch.from_numpy(np.asarray(Image.open(path)).transpose(2, 0, 1).copy())[None]


def tiles(path: Path, columns: int) -> torch.Tensor:
    """(rows, columns, 3, 16, 16) of a picture whose images of 16 pixels are enlarged to 64. Labels are above and to the
    left of the grid.
    """
    page = np.asarray(Image.open(path))
    left = np.flatnonzero(~page[-1].any(1))[0]  # the borders of the grid are black, the labels are on white
    top = np.flatnonzero(page[:, left].any(1))[-1:] + 1 if page[0, left].any() else [0]
    grid = page[top[0] :, left : left + columns * 66 + 2]
    rows = (grid.shape[0] - 2) // 66
    assert grid.shape == (rows * 66 + 2, columns * 66 + 2, 3)
    cut = [
        [grid[2 + 66 * r : 66 * (r + 1) : 4, 2 + 66 * c : 66 * (c + 1) : 4] for c in range(columns)]
        for r in range(rows)
    ]
    return torch.from_numpy(np.array(cut)).permute(0, 1, 4, 2, 3)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one gray level: batches of other sizes round otherwise."""
    assert found.shape == expected.shape
    assert int((found.int() - expected.int()).abs().max()) <= 1
