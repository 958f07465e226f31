"""Tensors of a checkpoint, checked before they are loaded."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MAX_SHOWN = 5
"""Tensors that an error message names at most."""


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load weights into a model. Raises ValueError as `check_tensors` does."""
    check_tensors("model", tensors, model.state_dict())
    model.load_state_dict(tensors)


def check_tensors(file: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError where `found` has other names, shapes or dtypes than `expected`, or non-finite values.

    `file`: the stem of the checkpoint's file, for the message.
    """
    problems = problems_of(found, expected)
    if problems:
        raise ValueError(f"{file}.safetensors does not fit this run:\n  " + "\n  ".join(problems))


def problems_of(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """A line for each of the first tensors that are missing, unknown, or not as expected, and one for the others."""
    problems = [f"{name!r} is missing" for name in expected if name not in found]
    problems += [f"{name[:100]!r} is unknown" for name in found if name not in expected]
    if not problems:
        problems = [f"{name!r} {problem}" for name in expected if (problem := _problem(found[name], expected[name]))]
    more = len(problems) - MAX_SHOWN
    return problems[:MAX_SHOWN] + ([f"and {more} more"] if more > 0 else [])


def _problem(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"has dtype {found.dtype} instead of {expected.dtype}".replace("torch.", "")
    if not bool(torch.isfinite(found).all()):
        return "has non-finite values"
    return None
