"""Small shard sets that several test files read."""

from pathlib import Path

import pytest

from tests.helpers.shard_server import ShardServer, fetch_quickly
from tests.helpers.shard_sets import Samples, random_samples, write_set


@pytest.fixture(params=["npy", "png"])
def encoding(request) -> str:
    return request.param


@pytest.fixture
def small(tmp_path) -> tuple[Path, Samples]:
    """23 .npy samples in shards of 10, 8 and 5."""
    samples = random_samples(23, attributes=2)
    return write_set(tmp_path / "small", {"train": samples}, [10, 8, 5]), samples


@pytest.fixture
def small_png(tmp_path) -> tuple[Path, Samples]:
    samples = random_samples(23)
    return write_set(tmp_path / "small_png", {"train": samples}, [10, 8, 5], "png"), samples


@pytest.fixture
def quick_fetching(monkeypatch):
    fetch_quickly(monkeypatch)


@pytest.fixture
def samples() -> Samples:
    return random_samples(35, 8, 8)


@pytest.fixture
def root(tmp_path, samples) -> Path:
    return write_set(tmp_path / "origin", {"train": samples, "test": random_samples(3, 8, 8)}, [10])


@pytest.fixture
def server(root):
    """Serves the set at `root`."""
    with ShardServer(root) as server:
        yield server
