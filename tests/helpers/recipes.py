"""A small recipe and its data, for tests that train for a few steps."""

from pathlib import Path

import yaml

from tests.helpers.shard_sets import random_samples, write_set


def tiny_settings(root: Path | str) -> dict:
    """A whole recipe of an NVAE with two latent scales and flows, small enough to train for a few steps in a test."""
    return {
        "model": {
            "name": "nvae",
            "groups_per_scale": [1, 2],
            "encoder_channels": 4,
            "decoder_channels": 4,
            "latent_channels": 2,
            "num_preprocess_cells": 1,
            "num_postprocess_cells": 1,
            "num_encoder_cells": 1,
            "num_decoder_cells": 1,
            "num_flows": 1,
            "likelihood": {"name": "logistic_mixture", "num_components": 2},
        },
        "data": {"root": str(root), "size": 16, "flip": True, "workers": 0},
        "train": {"steps": 6, "batch_size": 8, "cpu_threads": 1, "ema_decay": 0.9},
        "optim": {"warmup_steps": 2},
        "validation": {"every": 3, "batch_size": 6, "importance_samples": 2},
        "samples": {"every": 6, "count": 4, "reconstructions": 4},
        "checkpoint": {"every": 2},
        "tracking": {"wandb": "disabled", "log_every": 2},
    }


def write_tiny_set(root: Path, train_seed: int = 0, test_seed: int = 0) -> Path:
    """RGB noise of 16x16: 41 images to train on, in ragged shards, and 13 to test on."""
    splits = {"train": random_samples(41, 16, 16, seed=train_seed), "test": random_samples(13, 16, 16, seed=test_seed)}
    return write_set(root, splits, [10, 7])


def merged(settings: dict, sections: dict[str, dict]) -> dict:
    """A copy of the settings with these values of these sections changed."""
    return settings | {name: settings.get(name, {}) | values for name, values in sections.items()}


def write_tiny_recipe(folder: Path, data: Path, /, **sections: dict) -> Path:
    """`folder`/tiny.yaml: the tiny recipe in batches of 12, which 1, 2 and 3 processes can share, logged every step."""
    settings = merged(tiny_settings(data), {"train": {"batch_size": 12}, "tracking": {"log_every": 1}})
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged(settings, sections)))
    return path
