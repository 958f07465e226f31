"""Train, evaluate and use variational autoencoders. `load(RUN)` gives a trained model to work with."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pipeline.inference.trained import Trained


def load(run: Path | str, checkpoint: Path | str = "latest", device: "torch.device | str | None" = None) -> "Trained":
    """The trained model of a run folder; see pipeline.inference.trained.load."""
    from pipeline.inference.trained import (
        load as load_trained,  # torch takes seconds to import, and not all of us need it
    )

    return load_trained(run, checkpoint, device)
