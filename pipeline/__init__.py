"""Train, evaluate and use variational autoencoders. `load(LOCATION)` gives a trained model to work with."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pipeline.inference.trained import TrainedModel


def load(
    location: Path | str, checkpoint: Path | str | int = "latest", device: "torch.device | str | None" = None
) -> "TrainedModel":
    """The trained model of a run, a model folder or the Hugging Face Hub; see pipeline.inference.load_model.load."""
    from pipeline.inference.load_model import load as load_trained  # importing torch takes seconds

    return load_trained(location, checkpoint, device)
