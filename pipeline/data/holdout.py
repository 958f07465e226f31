"""A validation split for shard sets that have none: a share of the training split that is never trained on.

Which samples are held out is a function of (seed, number of samples in the split): the same for every number of
processes and workers, and at every start.
"""

import hashlib
from typing import Any

import numpy as np

from pipeline.data.loader import DataConfig
from pipeline.data.random_hash import Stream, hash64
from pipeline.data.shards import TarShards
from shard_data.manifest import Manifest

SPLIT = "val"
"""The name of the held-out samples as a split."""


def check_holdout(config: DataConfig, validation_split: str, manifest: Manifest, place: str) -> None:
    """Raises ValueError, naming the setting, where the set at `place` cannot give this share or it is not used."""
    if not config.holdout:
        return
    if SPLIT in manifest["splits"]:
        raise ValueError(f"data.holdout={config.holdout}: {place} has a split '{SPLIT}' already; set data.holdout=0")
    if validation_split not in (SPLIT, config.train_split):
        raise ValueError(
            f"data.holdout={config.holdout}: validation.split is '{validation_split}', so the held-out images would "
            f"not be used; set validation.split={SPLIT}"
        )
    split = manifest["splits"].get(config.train_split)
    if split is not None:
        num_held_out(config.holdout, split["count"])


def num_held_out(holdout: int | float, num_samples: int) -> int:
    """How many of `num_samples` are held out. Raises ValueError where none are left to train on."""
    count = holdout if isinstance(holdout, int) else max(1, round(holdout * num_samples))
    if count >= num_samples:
        raise ValueError(f"data.holdout={holdout}: the training split has {num_samples} images; hold out fewer")
    return count


def held_out_indices(holdout: int | float, num_samples: int, seed: int) -> np.ndarray:
    """The indices of the held-out samples in the training split, ascending (N,) int64."""
    keys = hash64(seed, Stream.HOLDOUT, np.arange(num_samples))
    return np.sort(np.argsort(keys, kind="stable")[: num_held_out(holdout, num_samples)])


def open_split(root: str, split: str, config: DataConfig, seed: int, verify: bool, origin: str | None) -> TarShards:
    """A split as the recipe defines it: with `data.holdout`, the training split is without the held-out samples, which
    are the split `val`. Raises ValueError where the set has no such split.
    """
    if not config.holdout or split not in (SPLIT, config.train_split):
        return TarShards(root, split, verify, origin)
    whole = TarShards(root, config.train_split, verify, origin)
    held_out = held_out_indices(config.holdout, len(whole), seed)
    members = held_out if split == SPLIT else np.setdiff1d(np.arange(len(whole)), held_out, assume_unique=True)
    return whole.subset(members, split)


def random_images(shards: TarShards, count: int | None, seed: int | None) -> TarShards:
    """`count` samples at random, a function of (seed, number of samples); all of them where `count` or `seed` is None
    or there are no more.
    """
    if count is None or seed is None or count >= len(shards):
        return shards
    keys = hash64(seed, Stream.CHOICE, np.arange(len(shards)))
    return shards.subset(np.sort(np.argsort(keys, kind="stable")[:count]))


def describe_holdout(config: DataConfig, seed: int, train: TarShards) -> dict[str, Any] | None:
    """What a checkpoint records of the held-out samples; None where there are none.

    `train`: the training split without them. Equal records are the same samples of the same set.
    """
    if not config.holdout:
        return None
    num_samples = train.manifest["splits"][config.train_split]["count"]
    held_out = held_out_indices(config.holdout, num_samples, seed)
    return {
        "count": len(held_out),
        "of": num_samples,
        "fingerprint": train.fingerprint,
        "sha256": hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest(),
    }
