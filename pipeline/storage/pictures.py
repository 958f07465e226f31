"""PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.storage.atomic import replacing


def save_png(path: Path | str, grid: np.ndarray) -> None:
    """Writes a uint8 array (height, width, 3). At any time `path` holds a complete picture or does not exist."""
    with replacing(Path(path)) as file:
        Image.fromarray(grid).save(file, format="PNG")
