"""Checkpoints of VDVAE's reference release (github.com/openai/vdvae): read as the content of a model folder, and
written from a model.

Such a file is the state dict of a model, or of its moving average, and nothing else. It states no option, so that the
architecture comes from a recipe. Nothing of the file can run code, and its tensors are used only where every name,
shape and dtype is that of the recipe's model.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.inference.model_folder import ModelContent, check_weights, read_recipe
from pipeline.inference.releases import Weights, checked_tensors, chosen_stem, exportable_network, log_start, one_line
from pipeline.inference.text import printable
from pipeline.models.vdvae_conversion import (
    keys_to_reference,
    options_for,
    state_dict_from_reference,
    state_dict_to_reference,
)
from pipeline.recipe import Recipe, build_model, load_recipe, recipe_path, shipped_recipes
from pipeline.storage.checkpoint_folder import Checkpoint
from pipeline.storage.pickled_checkpoint import read_pickled, write_pickled
from shard_data.files import sha256

log = logging.getLogger("pipeline")

KIND = "openai-vdvae"
PREFIX = "module."
"""In front of every name in a file of a model that was trained by several processes."""
PUBLISHED: dict[str, list[str]] = {
    "vdvae_cifar10": [],
    "vdvae_imagenet32": [],
    "vdvae_imagenet64": [],
    "vdvae_ffhq256": ["data.bits=8", "model.likelihood.bin_rule=vdvae_overlapping_5_bit"],
}
"""The recipes of published models, with what differs between the recipe and the release."""


def read_release(path: Path, recipe: str | None = None) -> ModelContent:
    """The model of a file of the release. Its weights are views of the file, which must stay as it is meanwhile.

    `recipe`: a name of `pipeline/configs` or a YAML file; by default the published model whose tensors have the names
    and shapes of the file's. Raises ValueError, in one line that names the file, for another kind of file, and for
    tensors that are missing, left over or of another shape or dtype; OSError.
    """
    chosen = None if recipe is None else find_recipe(recipe)
    saved = read_pickled(path)
    try:
        tensors = checked_tensors(state_dict_of(saved), path.stat().st_size)
        chosen = chosen or matching_recipe(tensors)
        weights = state_dict_from_reference(tensors, meta_state(chosen))
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:  # of torch, for absurd sizes
        raise ValueError(f"{path}: {one_line(error)}") from None
    source = {"kind": KIND, "file": printable(path.name), "sha256": sha256(path)}
    return ModelContent(chosen, weights, 0, {"source": source})


def find_recipe(name: str) -> Recipe:
    """The recipe of VDVAE that --recipe names. Raises ValueError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else recipe_path(name)
    recipe = load_recipe(path, PUBLISHED.get(name, []))
    if recipe.model.name != "vdvae":
        known = ", ".join(one for one in shipped_recipes() if one.startswith("vdvae"))
        raise ValueError(f"--recipe {name}: model.name={recipe.model.name}; give a recipe of VDVAE: {known}, or a file")
    return recipe


def state_dict_of(saved: Any) -> dict[Any, Any]:
    """The state dict, without the prefix. Raises ValueError for another kind of content."""
    if not isinstance(saved, dict) or not saved:
        raise ValueError(f"holds {'nothing' if saved == {} else f'a {type(saved).__name__}'}, not a state dict")
    if {"state_dict", "args"} <= saved.keys():
        raise ValueError("a checkpoint of NVAE's release; read it with --from nvlabs")
    if {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            "holds the state of an optimizer; give the file of the model or of its moving average (-model.th, "
            "-model-ema.th)"
        )
    if all(isinstance(name, str) and name.startswith(PREFIX) for name in saved):
        return {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()}
    return saved


def matching_recipe(tensors: Mapping[str, Tensor]) -> Recipe:
    """The recipe of the published model that has these tensors. Raises ValueError where there is none."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in PUBLISHED:
        recipe = find_recipe(name)
        state = meta_state(recipe)
        if found == {theirs: state[ours].shape for ours, theirs in keys_to_reference(state).items()}:
            log.info("names and shapes are those of %s", name)
            return recipe
    raise ValueError(
        f"its {len(found)} tensors are not those of {', '.join(PUBLISHED)}; name the recipe of its architecture with "
        "--recipe NAME or --recipe FILE.yaml"
    )


def meta_state(recipe: Recipe) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the recipe's model."""
    with torch.device("meta"):
        return build_model(recipe).state_dict()


# ---- writing --------------------------------------------------------------------------------------------------------


def write_release(path: Path, checkpoint: Checkpoint, weights: Weights | None = None) -> None:
    """Writes a new file, completely or not at all, and logs the options that the release's code needs beside it.

    `weights`: which ones, of a run that keeps a moving average. Raises ValueError where the file is there, and, naming
    the setting, for what the release has no option for.
    """
    if path.exists():
        raise ValueError(f"{path} is there; name a new file")
    recipe = read_recipe(checkpoint)
    try:
        options, stem = release_options(recipe), chosen_stem(checkpoint, weights)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: cannot be written in the release's format: {error}") from None
    check_weights(recipe, checkpoint.tensors[stem], str(checkpoint.path), stem)
    log_start(KIND, path, checkpoint, weights)
    in_order = {name: checkpoint.tensors[stem][name] for name in meta_state(recipe)}
    write_pickled(path, OrderedDict(state_dict_to_reference(in_order)))
    given = " ".join(f"--{name} {value}" for name, value in options.items() if value != "")
    log.info("the file states no options; the release's code needs %s", given)


def release_options(recipe: Recipe) -> dict[str, Any]:
    """By the release's names. Raises ValueError, naming the setting, for a model that its code does not have."""
    return options_for(exportable_network(recipe, "vdvae", "VDVAE"))
