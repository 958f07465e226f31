"""The lines at the start of a command that uses a trained model, and the line at its end that names what it wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline.inference.text import printable
from shard_data.terminal import aligned


def first_lines(
    what: str, model: str, step: int, device: torch.device | str | None, facts: Mapping[str, str | Sequence[str]]
) -> list[str]:
    """`64 samples of nvae at step 1,000 on cpu`, and below it a line for each fact that is not empty: which weights,
    where the result goes.

    `step`: 0 where it is unknown. `device`: None where nothing is computed.
    """
    at, on = f" at step {step:,}" if step else "", f" on {device}" if device else ""
    return [f"{what} of {model}{at}{on}", *aligned(facts)]


def weights_of(place: str, averaged: bool) -> str:
    """Where the weights are, and which ones are used."""
    return f"{printable(place)}{', the moving average of the weights' if averaged else ''}"


def some_of(names: Sequence[str], shown: int = 3) -> str:
    """`a, b, c and 5 more`."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return printable(", ".join(names[:shown])) + more


def written_to(folder: Path) -> str:
    """`written to models/faces: README.md, config.yaml, ...`."""
    return f"written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}"
