"""Tests of logging run without a W&B key."""

import os
import sys

import pytest

from tests.helpers.trackers import KEY
from tests.helpers.wandb_server import WandbServer


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """A machine without a W&B key, whatever this one has, and a fresh wandb afterwards."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def server(monkeypatch):
    """A stand-in for W&B's server, to which wandb sends with a key."""
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
