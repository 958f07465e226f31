"""Compiled training with and without a C++ compiler."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
from torch._dynamo.utils import counters

from pipeline.run import build
from pipeline.run.compilation import compile_training

COMPILERS = ("g++", "clang++", "c++")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="torch.compile on CPU needs a C++ compiler"
)


@contextmanager
def no_compiler_needed(backend: str | Callable) -> Iterator[dict[str, int]]:
    """Trainers that are built inside the block compile with this backend. Gives torch's statistics of compilation."""
    counters.clear()
    with (
        patch.object(build, "prepare_compiler", lambda *arguments: None),
        patch.object(build, "compile_training", partial(compile_training, backend=backend)),
    ):
        yield counters["stats"]
