"""What several files of tests here use."""

from pathlib import Path

import pytest

from tests.helpers.shard_sets import random_samples, write_set


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Six images of 16 x 16, the split `test`."""
    return write_set(tmp_path_factory.mktemp("shards") / "set", {"test": random_samples(6, 16, 16, seed=2)}, [6])
