"""Folders that a command line names: shard sets to read, and folders of a run to write into."""

import os
from pathlib import Path

from pipeline.data.remote import fetch_manifest, is_address
from pipeline.data.shards import TarShards
from shard_data import manifest


def open_split(root: str | Path, split: str) -> TarShards:
    """Raises ValueError for a folder that is not a shard set, and for an unknown split, with those that the set has."""
    check_split(root, split)
    return TarShards(root, split)


def check_at_hand(root: str | None) -> None:
    """Raises ValueError where the shard set that a model was trained on is not on this machine, nor at an address."""
    if root is None or not (is_address(root) or Path(root).is_dir()):
        name = (
            f"{root}, the shard set that the model was trained on, is not here" if root else "the model names no data"
        )
        raise ValueError(f"{name}; name a shard set with --data DIR")


def check_split(root: str | Path, split: str) -> None:
    """Raises as `open_split` does."""
    manifest.check_splits(manifest.load(Path(root)), str(root), {"--split": split})


def load_manifest(root: str) -> manifest.Manifest:
    """Of the shard set in a folder or at an address. Raises ValueError if there is none."""
    return manifest.parse(fetch_manifest(root), root) if is_address(root) else manifest.load(Path(root))


def output_folder(run: Path, name: str) -> Path:
    """RUN/name. Raises ValueError if it is a symbolic link, which could lead out of the run folder."""
    folder = run / name
    if folder.is_symlink():
        raise ValueError(f"{folder}: is a symbolic link, which is refused; name another place with --out")
    return folder


def check_writable(folder: Path) -> None:
    """Raises ValueError for a folder that cannot be written to, before hours of work are lost."""
    existing = folder if folder.exists() else folder.parent
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing}: no permission to write there; name another place with --out")
