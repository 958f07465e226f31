"""A checkpoint of NVAE's reference release (github.com/NVlabs/NVAE) as the content of a model folder.

The file holds a network's weights under the release's names, and its options in an `argparse.Namespace`. Nothing of it
can run code, and every option is checked before memory for a model is allocated.
"""

import argparse
import logging
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from pipeline.config import ConfigError, build, load_yaml
from pipeline.inference.model_folder import ModelContent
from pipeline.inference.releases import RELEASES, checked_tensors, one_line
from pipeline.inference.text import printable
from pipeline.models.nvae_conversion import state_dict_from_reference
from pipeline.models.nvae_options import BINARY_BORDER, ReleaseOptions, cell_operations
from pipeline.recipe import Recipe, build_model, recipe_path
from pipeline.storage.pickled_checkpoint import read_pickled
from shard_data.files import sha256

log = logging.getLogger("pipeline")

KIND = "nvlabs"
RECIPES = {
    "mnist": "nvae_mnist",
    "cifar10": "nvae_cifar10",
    "celeba_64": "nvae_celeba64",
    "imagenet_32": "nvae_imagenet32",
    "celeba_256": "nvae_celebahq256",
    "ffhq": "nvae_ffhq256",
}
"""The recipe for a data set of the release; its sections `data` and `validation` are used."""
OTHER_OPTIONS = {
    *("root", "save", "data", "cont_training", "fast_adamax", "num_total_iter"),
    *("distributed", "node_rank", "local_rank", "global_rank", "master_address"),
}
"""Options that decide neither the model nor its training."""
ENTRIES = {
    *("state_dict", "args", "arch_instance", "epoch", "global_step"),
    *("optimizer", "scheduler", "grad_scalar"),
}
"""Entries of a checkpoint; the last three resume training in the release."""
MAX_COUNT = 2**53


def read_release(path: Path) -> ModelContent:
    """The model of a checkpoint of the release. Its weights are views of the file, which must stay as it is meanwhile.

    Raises ValueError, in one line that names the file, for another kind of file, an option or a network that this
    project does not have, and for tensors that are missing, left over or of another shape; OSError.
    """
    saved = read_pickled(path)
    try:
        return _content(path, saved)
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:  # of torch, for absurd sizes
        raise ValueError(f"{path}: {one_line(error)}") from None


def _content(path: Path, saved: Any) -> ModelContent:
    state, args = _parts(saved)
    _warn_of("entries", saved.keys() - ENTRIES)
    options = read_options(args)
    _check_cells(options, saved.get("arch_instance"))
    recipe = recipe_for(options)
    with torch.device("meta"):
        expected = build_model(recipe).state_dict()
    weights = state_dict_from_reference(checked_tensors(state, path.stat().st_size), expected)
    facts = {
        "source": {"kind": KIND, "file": printable(path.name), "sha256": sha256(path), "license": RELEASES[KIND].name},
        KIND: {"epoch": _count(saved, "epoch"), "options": options.model_dump(mode="json")},
    }
    return ModelContent(recipe, weights, _count(saved, "global_step"), facts)


def _parts(saved: Any) -> tuple[Mapping, Mapping]:
    """(state_dict, options) of the pickled content. Raises ValueError for another kind of content."""
    if not isinstance(saved, dict):
        raise ValueError(f"holds a {type(saved).__name__}; a checkpoint of the release is a dict with state_dict, args")
    missing = [name for name in ("state_dict", "args") if name not in saved]
    if missing:
        found = printable(", ".join(str(name)[:40] for name in list(saved)[:5] if isinstance(name, str)))
        raise ValueError(f"not a checkpoint of the release: it has no {' and no '.join(missing)} (it has: {found})")
    if not isinstance(saved["state_dict"], dict) or type(saved["args"]) is not argparse.Namespace:
        raise ValueError("not a checkpoint of the release: state_dict is no dict, or args no argparse.Namespace")
    return saved["state_dict"], vars(saved["args"])


def read_options(args: Mapping[str, Any]) -> ReleaseOptions:
    """Checked options. Raises ValueError that names each one that is missing or cannot be used."""
    used = {name: value for name, value in args.items() if name in ReleaseOptions.model_fields}
    for name, value in used.items():
        if type(value) not in (bool, int, float, str):
            raise ValueError(f"option {name} is a {type(value).__name__}, not a number or text")
    _warn_of("options", args.keys() - used.keys() - OTHER_OPTIONS)
    try:
        options = build(ReleaseOptions, used)
    except ConfigError as error:
        problems = "; ".join(str(error).splitlines())
        raise ValueError(f"its options (args) cannot be used: {problems}") from None
    assumed = [f"{name}={value}" for name, value in options.model_dump().items() if name not in used]
    if assumed:
        log.warning("options that the file does not state, taken as the release's default: %s", ", ".join(assumed))
    return options


def _warn_of(what: str, unknown: Set[Any]) -> None:
    """Names what a file has and the release does not."""
    if unknown:
        names = printable(str(sorted(str(name)[:40] for name in unknown)))
        log.warning("%s that are not used, because the release does not have them: %s", what, names)


def _check_cells(options: ReleaseOptions, found: Any) -> None:
    """Raises ValueError where the file's own list of operations is not that of its architecture's name."""
    expected = cell_operations(options.arch_instance)
    for kind in expected.keys() & (found if isinstance(found, dict) else {}):
        if found[kind] != expected[kind]:
            raise ValueError(
                f"its cells {kind} are made of {printable(str(found[kind])[:100])}, but arch_instance="
                f"{options.arch_instance} has {expected[kind]}; such a network is not supported"
            )


def _count(saved: Mapping, name: str) -> int:
    """A count of the file; 0 where it has none."""
    value = saved.get(name, 0)
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise ValueError(f"{name} is {printable(repr(value)[:40])}, not a count")
    return value


# ---- the recipe -----------------------------------------------------------------------------------------------------


def recipe_for(options: ReleaseOptions) -> Recipe:
    """The recipe that trains and evaluates as the release does with these options. Raises ValueError."""
    shipped = RECIPES.get(options.dataset)
    sections = load_yaml(recipe_path(shipped)) if shipped else {"data": _data(options), "validation": {}}
    settings = {
        "model": options.network().config.model_dump(mode="json"),
        "data": sections["data"] | {"bits": options.num_x_bits},
        "validation": sections["validation"],
        **_training(options),
    }
    return build(Recipe, settings)


def _data(options: ReleaseOptions) -> dict[str, Any]:
    if options.is_binary:
        size = options.image_size - 2 * BINARY_BORDER
        return {"size": size, "channels": 1, "pad": BINARY_BORDER, "binarize": "dynamic"}
    return {"size": options.image_size, "channels": 3, "flip": True}


def _training(options: ReleaseOptions) -> dict[str, Any]:
    processes = options.num_process_per_node * options.num_proc_node
    annealed = options.weight_decay_norm_anneal and options.weight_decay_norm > 0
    return {
        "train": {"epochs": options.epochs, "batch_size": options.batch_size * processes, "seed": options.seed},
        "objective": {
            "kl_warmup_portion": options.kl_anneal_portion,
            "kl_warmup_delay": options.kl_const_portion,
            "kl_warmup_floor": options.kl_const_coeff,
            "kl_balancing": "square",
        },
        "regularizers": {
            "strength": options.weight_decay_norm,
            "initial_strength": options.weight_decay_norm_init if annealed else None,
        },
        "optim": {
            "name": "adamax",
            "lr": options.learning_rate,
            "lr_min": options.learning_rate_min,
            "schedule": "cosine_per_epoch",
            "warmup_epochs": options.warmup_epochs,
            "weight_decay": options.weight_decay,
        },
    }
