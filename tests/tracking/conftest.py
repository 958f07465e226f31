"""Tests of logging run without a W&B key."""

import os
import sys

import pytest


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
