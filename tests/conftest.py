"""What several test files share: a small shard set, a recipe for it, and a fresh runtime."""

import os
from pathlib import Path

import hypothesis
import pytest
from accelerate.state import AcceleratorState

from pipeline.config import build, overlay
from pipeline.distributed.runtime import Runtime
from pipeline.recipe import Recipe
from tests.helpers.shard_sets import random_samples, write_set

os.environ.setdefault("WANDB_MODE", "offline")
# First calls on a busy machine are slow, and no test measures time.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """RGB noise of 16x16: 41 images to train on, in ragged shards, and 13 to test on."""
    splits = {"train": random_samples(41, 16, 16, 3, seed=1), "test": random_samples(13, 16, 16, 3, seed=2)}
    return write_set(tmp_path_factory.mktemp("shards") / "tiny", splits, [10, 7])


def tiny_settings(root: Path) -> dict:
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


@pytest.fixture
def settings(tiny_set) -> dict:
    return tiny_settings(tiny_set)


@pytest.fixture
def make_recipe(settings):
    """(words) -> the tiny recipe with these settings changed."""
    return lambda *words: build(Recipe, overlay(settings, words))


@pytest.fixture
def make_runtime():
    """(precision) -> a Runtime of one process; Accelerate's global state is made anew for each."""

    def make(precision: str = "fp32") -> Runtime:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Runtime(precision, cpu_threads=1)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
