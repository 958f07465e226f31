"""A trained NVAE as a checkpoint that NVAE's reference release (github.com/NVlabs/NVAE) reads.

The format has one set of weights, the options of the release, and Adamax's state. What it has no place for is refused
by name.
"""

import argparse
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import build
from pipeline.inference.model_folder import check_weights, read_recipe
from pipeline.inference.nvlabs_import import KIND
from pipeline.inference.releases import Weights, chosen_stem, exportable_network, log_start
from pipeline.models.base import VAE
from pipeline.models.nvae_conversion import UNUSED, state_dict_to_reference
from pipeline.models.nvae_options import ReleaseOptions, cell_operations, options_for
from pipeline.models.release_network import Network
from pipeline.models.weights import problems_of
from pipeline.recipe import Recipe, build_model
from pipeline.storage.checkpoint_folder import Checkpoint
from pipeline.storage.pickled_checkpoint import write_pickled
from pipeline.training.optim import OptimConfig

FIXED_OPTIONS = {
    "fast_adamax": True,
    "cont_training": False,
    "root": "",
    "save": "",
    "data": "",
    "num_proc_node": 1,
    "num_process_per_node": 1,
    "node_rank": 0,
    "local_rank": 0,
    "global_rank": 0,
    "master_address": "127.0.0.1",
    "distributed": True,
}
"""Options of the release about the machine that it runs on."""
GRAD_SCALER = {
    "scale": 1024.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}
"""The state of a new gradient scaler with the release's initial scale."""


def write_release(path: Path, checkpoint: Checkpoint, weights: Weights | None = None) -> None:
    """Writes a new file, completely or not at all. `weights`: which ones, of a run that keeps a moving average.

    Raises ValueError where the file is there, and, naming the setting, for what the format has no place for.
    """
    if path.exists():
        raise ValueError(f"{path} is there; name a new file")
    content = release_content(checkpoint, weights)
    log_start(KIND, path, checkpoint, weights)
    write_pickled(path, content)


def release_content(checkpoint: Checkpoint, weights: Weights | None = None) -> dict[str, Any]:
    """The dictionary that a checkpoint of the release is. Raises ValueError as `write_release` does."""
    recipe = read_recipe(checkpoint)
    try:
        network = exportable_network(recipe, "nvae", "NVAE")
        options = _release_options(recipe, network, _from_release(checkpoint))
        stem = chosen_stem(checkpoint, weights)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: cannot be written in the release's format: {error}") from None
    check_weights(recipe, checkpoint.tensors[stem], str(checkpoint.path), stem)
    with torch.device("meta"):
        model = build_model(recipe)
    weights_in_order = {name: checkpoint.tensors[stem][name] for name in model.state_dict()}
    epoch = _from_release(checkpoint).get("epoch")
    same_moments = recipe.optim.name == "adamax" and recipe.optim.gradient_unit == "nats_per_image"
    moments = checkpoint.tensors.get("optimizer", {}) if stem == "model" and same_moments else {}
    return {
        "epoch": epoch if isinstance(epoch, int) else 0,
        "state_dict": _state_dict(network, weights_in_order),
        "optimizer": _optimizer(model, recipe.optim, moments, first=int(network.config.is_vanilla)),
        "global_step": checkpoint.step,
        "args": argparse.Namespace(**options),
        "arch_instance": cell_operations(options["arch_instance"]),
        "scheduler": _scheduler(options),
        "grad_scalar": GRAD_SCALER,
    }


def _from_release(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What `nvlabs_import` has noted of a file of the release; empty for other models."""
    noted = checkpoint.facts.get(KIND)
    return noted if isinstance(noted, dict) else {}


def _release_options(recipe: Recipe, network: Network, noted: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the release: the ones that the weights came with, or those that describe the recipe."""
    if isinstance(noted.get("options"), dict):
        original = build(ReleaseOptions, noted["options"])
        if original.network() == network:
            return FIXED_OPTIONS | original.model_dump()
    options = build(ReleaseOptions, options_for(network) | _training_options(recipe))
    return FIXED_OPTIONS | options.model_dump()


def _training_options(recipe: Recipe) -> dict[str, Any]:
    """The release's names and values of the settings that it has as well; its defaults for the others."""
    optim, objective, regularizers = recipe.optim, recipe.objective, recipe.regularizers
    annealed = {"weight_decay_norm_init": regularizers.initial_strength} if regularizers.initial_strength else {}
    epochs = {"epochs": max(1, round(recipe.train.epochs))} if recipe.train.epochs else {}
    return {
        **epochs,
        "batch_size": recipe.train.batch_size,
        "seed": recipe.train.seed,
        "learning_rate": optim.lr,
        "learning_rate_min": optim.lr_min,
        "warmup_epochs": optim.warmup_epochs,
        "weight_decay": optim.weight_decay,
        "weight_decay_norm": regularizers.strength,
        "weight_decay_norm_anneal": bool(annealed),
        **annealed,
        "kl_anneal_portion": objective.kl_warmup_portion,
        "kl_const_portion": objective.kl_warmup_delay,
        "kl_const_coeff": objective.kl_warmup_floor,
    }


def _state_dict(network: Network, weights: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """With the parameter that the release has, and does not use, in a model of a single latent group."""
    state = state_dict_to_reference(weights)
    if UNUSED not in state:
        top = network.image_shape[1] >> network.config.num_halvings
        width = network.config.decoder_channels << network.config.num_halvings
        state = {UNUSED: torch.zeros(width, top, top)} | state
    return OrderedDict(state)


def _optimizer(model: VAE, optim: OptimConfig, moments: Mapping[str, Tensor], first: int) -> dict[str, Any]:
    """Adamax's state by the numbers of the parameters, from `first`; without entries where there are no moments."""
    names = [name for name, _ in model.named_parameters()]
    state = {}
    if moments:
        _check_moments(model, moments)
        state = {
            number: {
                "step": int(moments[f"{name}/step"]),
                "exp_avg": moments[f"{name}/exp_avg"],
                "exp_inf": moments[f"{name}/exp_inf"],
            }
            for number, name in enumerate(names, first)
        }
    group = {
        "lr": optim.lr,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "initial_lr": optim.lr,
        "params": list(range(first + len(names))),
    }
    return {"state": state, "param_groups": [group]}


def _check_moments(model: VAE, moments: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    expected = {f"{name}/{slot}": p for name, p in parameters.items() for slot in ("exp_avg", "exp_inf")}
    expected |= {f"{name}/step": torch.empty((), device="meta") for name in parameters}
    problems = problems_of(moments, expected)
    if problems:
        raise ValueError("optimizer.safetensors is not the state of this model's Adamax: " + "; ".join(problems))


def _scheduler(options: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the release's cosine at its first epoch."""
    lr = options["learning_rate"]
    return {
        "T_max": options["epochs"] - options["warmup_epochs"] - 1,
        "eta_min": options["learning_rate_min"],
        "base_lrs": [lr],
        "last_epoch": 0,
        "_step_count": 1,
        "_last_lr": [lr],
    }
