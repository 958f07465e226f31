"""What is common to checkpoints of other implementations: licenses of their weights, and checks of their files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pipeline.distributed.logs import log_lines
from pipeline.inference import announce
from pipeline.inference.model_folder import is_averaged, read_recipe
from pipeline.inference.text import printable
from pipeline.models.release_network import Network
from pipeline.recipe import Recipe
from pipeline.storage.checkpoint_folder import Checkpoint
from pipeline.storage.pickled_checkpoint import check_tensor

Weights = Literal["average", "last"]
"""Which weights of a run that keeps a moving average."""


@dataclass(frozen=True)
class License:
    """What a model card states as the license of the weights."""

    id: str
    """As the Hub spells it: apache-2.0, cc-by-nc-4.0, ... or `other`."""
    name: str | None = None
    """Of another license."""
    link: str | None = None
    """To the text of another license."""
    note: str = ""
    """A sentence for the card."""


RELEASES: dict[str, License | None] = {
    "nvlabs": License(
        "other",
        "nvlabs-nvae-non-commercial",
        "https://github.com/NVlabs/NVAE/blob/master/LICENSE",
        "They come from NVIDIA's release of NVAE, whose license allows non-commercial use only.",
    ),
    "openai-vdvae": None,
}
"""The formats that `convert.py` reads, and the license of all weights in such files; None where a file can come from
anyone.
"""


def release_of(facts: Mapping[str, Any]) -> str | None:
    """The format of the file that the weights of a model folder came from; None for others."""
    source = facts.get("source")
    kind = source.get("kind") if isinstance(source, Mapping) else None
    return kind if isinstance(kind, str) and kind in RELEASES else None


def license_of(facts: Mapping[str, Any]) -> License | None:
    """The license of weights that came from a release, or were trained from such weights; None for others."""
    release = release_of(facts) or release_of({"source": facts.get("initialized_from")})
    return RELEASES.get(release or "")


def one_line(error: Exception) -> str:
    """The message of an error in one line of printable characters: parts of it may come from a file."""
    return " ".join(printable(line.strip()) for line in str(error).splitlines())[:2000]


def checked_tensors(state: Mapping, file_size: int) -> dict[str, Tensor]:
    """Raises ValueError unless all are plain tensors with text as names, and fit into the file."""
    if not all(isinstance(name, str) for name in state):
        raise ValueError("state_dict has names that are not text")
    tensors = {name: check_tensor(name, tensor, file_size) for name, tensor in state.items()}
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * file_size:  # some weights are there twice
        raise ValueError("its tensors together have more elements than the file holds")
    return tensors


def exportable_network(recipe: Recipe, model_name: str, title: str) -> Network:
    """The network of a recipe. Raises ValueError, naming the setting, for a model that no release has a format for."""
    if recipe.model.name != model_name:
        raise ValueError(f"model.name={recipe.model.name}; it has only {title}")
    if recipe.condition is not None:
        raise ValueError(f"condition.name={recipe.condition.name}; its models take no condition")
    if recipe.train.precision == "fp64":
        raise ValueError("train.precision=fp64; its weights are float32")
    data = recipe.data
    side = data.size + 2 * data.pad
    return Network(recipe.model, (data.channels, side, side), data.pad, data.bits)


def chosen_stem(checkpoint: Checkpoint, weights: Weights | None) -> str:
    """The stem of the file of weights to write. Raises ValueError where it has to be chosen, or is not there."""
    if "ema" in checkpoint.tensors:
        if weights is None:
            raise ValueError(
                "train.ema_decay; the run keeps a moving average of its weights beside them, and the format has one "
                "set of weights: give --weights average or --weights last"
            )
        return "ema" if weights == "average" else "model"
    if weights is not None and (weights == "average") != is_averaged(checkpoint):
        held = "the average" if is_averaged(checkpoint) else "the last weights"
        raise ValueError(f"--weights {weights}: it holds {held} only")
    return "model"


def log_start(kind: str, path: Path, checkpoint: Checkpoint, weights: Weights | None) -> None:
    """Which weights of which model are written in the format `kind`, and where."""
    stem = chosen_stem(checkpoint, weights)
    averaged = stem == "ema" if "ema" in checkpoint.tensors else is_averaged(checkpoint)
    facts = {"model": announce.weights_of(str(checkpoint.path), averaged), "writes": str(path)}
    name = read_recipe(checkpoint).model.name
    log_lines(announce.first_lines(f"{kind} checkpoint", name, checkpoint.step, None, facts))
