"""A small source, and the files of a folder after its conversion, read without shard_data."""

from pathlib import Path

import numpy as np
import webdataset

from shard_data import ToyFaces

SMALL_FACES = ToyFaces(size=16, train=23, val=7, test=0, seed=5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stock_samples(folder: Path, split: str, mode: str = "pill") -> list[dict]:
    """Every sample of a split as webdataset reads it; mode "pill" is gray."""
    tars = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False).decode(mode))


def index_rows(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.load(p, allow_pickle=False) for p in sorted(folder.glob(f"{split}-*.index.npy"))])
