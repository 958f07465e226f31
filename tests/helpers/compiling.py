"""Compiled training with a backend that needs no C++ compiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from torch._dynamo.utils import counters

from pipeline.run import build
from pipeline.run.compilation import compile_training


@contextmanager
def no_compiler_needed(backend: str) -> Iterator[dict[str, int]]:
    """Trainers that are built inside the block compile with this backend. Gives torch's statistics of compilation."""
    counters.clear()
    with (
        patch.object(build, "prepare_compiler", lambda *arguments: None),
        patch.object(build, "compile_training", partial(compile_training, backend=backend)),
    ):
        yield counters["stats"]
