"""Small MNIST files, written from the description of the IDX format."""

import gzip
import struct
from pathlib import Path

import numpy as np

COUNTS = {"train": 37, "t10k": 11}


def idx(array: np.ndarray) -> bytes:
    """An IDX file of uint8, written from its description."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def digits(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    rng, count = np.random.default_rng(len(prefix)), COUNTS[prefix]
    return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


def write_mnist(folder: Path, zipped: bool = True) -> Path:
    folder.mkdir()
    for prefix in COUNTS:
        for kind, array in zip(("images-idx3", "labels-idx1"), digits(prefix), strict=True):
            path = folder / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return folder
