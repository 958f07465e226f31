"""A model folder: one model's weights with recipe, card and picture, to keep, to copy or to publish.

    model.safetensors   the weights
    meta.json           step, settings, where the weights come from, sha256 of the weights and of itself
    config.yaml         the recipe, as `train.py --config` takes it
    README.md           the model card
    samples.png         a picture of samples, where one may be shown

The first two are a checkpoint folder (`pipeline.storage.checkpoint_folder`): only they are read, and what is read is
verified. The others are for people.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ConfigError, build, dump
from pipeline.models.weights import check_tensors
from pipeline.recipe import Recipe, build_model
from pipeline.storage.atomic import atomic_file
from pipeline.storage.checkpoint_folder import Checkpoint, read_folder, snapshot, write_folder
from pipeline.storage.new_folder import new_folder
from pipeline.storage.pictures import save_png

WEIGHTS, CONFIG, CARD, PICTURE = "model.safetensors", "config.yaml", "README.md", "samples.png"


@dataclass(frozen=True)
class ModelContent:
    """What a model folder holds, apart from its card and picture."""

    recipe: Recipe
    weights: Mapping[str, Tensor]
    """The model's state dict, in the dtype that it was trained in."""
    step: int
    """Optimizer step of the weights; 0 if it is unknown."""
    facts: Mapping[str, Any]
    """JSON values as in a checkpoint: `classes` (names), `data_fingerprint`, `holdout`, ... In a model folder also
    `source`: where the weights come from, such as {"kind": "run", "run_id": ..., "averaged": true}."""


def write_model_folder(folder: Path, content: ModelContent, card: str, picture: np.ndarray | None = None) -> None:
    """Writes a new model folder, complete or not at all. Equal arguments give equal bytes.

    `card`: Markdown. `picture`: uint8 (height, width, 3). Raises ValueError where `folder` is there and is not empty,
    and for weights that are not those of the recipe's model; OSError where it cannot be written.
    """
    check_weights(content.recipe, content.weights, "the model to write")
    facts = {**content.facts, "settings": content.recipe.model_dump(mode="json")}
    with new_folder(folder) as hidden:
        write_folder(hidden, snapshot({"model": content.weights}), content.step, facts, score=None)
        for name, text in ((CONFIG, dump(content.recipe)), (CARD, card)):
            with atomic_file(hidden / name) as file:
                file.write(text.encode())
        if picture is not None:
            save_png(hidden / PICTURE, picture)


def read_model_folder(folder: Path) -> ModelContent:
    """The verified content of a model folder or a checkpoint's folder. Raises ValueError, which names the problem.

    Of a checkpoint with a moving average of the weights, the weights are the averaged ones.
    """
    return content_of(read_folder(folder))


def content_of(checkpoint: Checkpoint) -> ModelContent:
    """The model of a checkpoint. Raises ValueError if this version cannot use it.

    The weights are compared with the model's before memory for it is allocated: forged settings could ask for any
    amount.
    """
    recipe = read_recipe(checkpoint)
    weights = checkpoint.tensors[weights_stem(checkpoint)]
    check_weights(recipe, weights, str(checkpoint.path), weights_stem(checkpoint))
    return ModelContent(recipe, weights, checkpoint.step, checkpoint.facts)


def weights_stem(checkpoint: Checkpoint) -> str:
    """The stem of the file whose weights are used: the moving average if there is one."""
    return "ema" if "ema" in checkpoint.tensors else "model"


def is_averaged(checkpoint: Checkpoint) -> bool:
    """Whether the weights that are used are a moving average; a model folder states it as a fact."""
    source = checkpoint.facts.get("source")
    stated = isinstance(source, dict) and source.get("averaged") is True
    return stated or weights_stem(checkpoint) == "ema"


def read_recipe(checkpoint: Checkpoint) -> Recipe:
    """The recipe that a checkpoint was trained with. Raises ValueError for settings that this version cannot use."""
    if "model" not in checkpoint.tensors or not isinstance(checkpoint.facts.get("settings"), dict):
        raise ValueError(f"{checkpoint.path}: holds no model with its settings; give the checkpoint of a run")
    try:
        return build(Recipe, checkpoint.facts["settings"])
    except ConfigError as error:
        raise ValueError(
            f"{checkpoint.path}: its settings are not those of this version of the pipeline:\n{error}"
        ) from None
    except (RuntimeError, OverflowError, TypeError, AttributeError) as error:  # of torch, for absurd sizes
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{checkpoint.path}: its settings describe no model that can be built ({reason})") from None


def training_dtype(recipe: Recipe) -> torch.dtype:
    """Of the weights in a checkpoint."""
    return torch.float64 if recipe.train.precision == "fp64" else torch.float32


def check_weights(recipe: Recipe, weights: Mapping[str, Tensor], where: str, stem: str = "model") -> None:
    """Raises ValueError unless the weights are those of the recipe's model: names, shapes, dtypes, finite values.

    `where` and `stem` name them in the message.
    """
    with torch.device("meta"):
        expected = build_model(recipe).to(training_dtype(recipe)).state_dict()
    try:
        check_tensors(stem, weights, expected)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
