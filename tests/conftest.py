"""Fixtures that several test files share: a small shard set, a recipe for it, and a new runtime."""

import logging
import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState

from pipeline.config import build, overlay
from pipeline.distributed.runtime import Runtime
from pipeline.recipe import Recipe
from tests.helpers.recipes import tiny_settings, write_tiny_set

os.environ.setdefault("WANDB_MODE", "offline")
# pytest-xdist runs a worker for each core: more threads would compete for the cores, and spin while they wait.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
# First calls on a busy machine are slow, and no test measures time.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
# A shell's background jobs ignore SIGINT, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fresh_logging():
    """Commands that run inside the test process set up the package's logger; each test starts with a fresh one.

    pytest adds a handler of its own to a logger that does not propagate, and would capture each record twice.
    """
    _reset_logging()
    yield
    _reset_logging()


def _reset_logging() -> None:
    log = logging.getLogger("pipeline")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("shards") / "tiny", train_seed=1, test_seed=2)


@pytest.fixture
def settings(tiny_set) -> dict:
    return tiny_settings(tiny_set)


@pytest.fixture
def make_recipe(settings):
    """(overrides) -> the tiny recipe with these settings changed."""
    return lambda *overrides: build(Recipe, overlay(settings, overrides))


@pytest.fixture
def make_runtime():
    """(precision) -> a Runtime of one process; Accelerate's global state is reset for each."""

    def make(precision: str = "fp32") -> Runtime:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Runtime(precision, cpu_threads=1)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
