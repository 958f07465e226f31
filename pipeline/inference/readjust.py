"""Batch norm's statistics re-estimated for sampling at one temperature, saved with a model.

Running statistics are those of posterior samples, on which the decoder was trained. At a low temperature prior samples
have others, and pictures become better with the statistics of such samples (NVAE section 4.1).
"""

import argparse
import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import collectives
from pipeline.evaluation.sample_grids import readjust_batch_norm
from pipeline.inference.latent_groups import TemperatureLike, resolve_temperature
from pipeline.inference.model_folder import ModelContent
from pipeline.inference.passes import IMAGES_PER_PASS
from pipeline.inference.trained import TrainedModel
from pipeline.models.base import VAE
from pipeline.models.conditions import ClassCondition
from pipeline.models.noise import draw_noise
from pipeline.nn.batch_norm import BatchNorm2d
from pipeline.recipe import Recipe, build_model
from shard_data.progress import advance
from shard_data.terminal import Progress

log = logging.getLogger("pipeline")

BATCH_SIZE = 16
"""Of the release's sampling tool."""


@dataclass(frozen=True)
class Readjustment:
    """How batch norm is re-estimated. Raises ValueError, naming the option, for values out of range."""

    iterations: int
    """Batches of prior samples."""
    temperature: float
    batch_size: int = BATCH_SIZE
    seed: int = 0
    """Of the latent noise."""

    def __post_init__(self):
        if self.iterations < 1:
            raise ValueError(f"--readjust {self.iterations}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature}: must be a finite number of at least 0")
        if self.batch_size < 2:
            raise ValueError(f"--batch-size {self.batch_size}: must be at least 2")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: must be from 0 to 2^63 - 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a tool that writes a model folder."""
    add = parser.add_argument
    statistics = "re-estimate batch norm's statistics with N batches of samples (default: keep those of the training)"
    add("--readjust", metavar="N", type=int, help=statistics)
    add("--temperature", metavar="T", type=float, help="with --readjust: of these samples, and of those to make later")
    add("--batch-size", metavar="B", type=int, help=f"with --readjust: of these samples (default {BATCH_SIZE})")
    add("--seed", type=int, help="with --readjust: of these samples (default 0)")


def parse_arguments(parsed: argparse.Namespace) -> Readjustment | None:
    """What the options ask for; None without --readjust. Raises ValueError for options that do not go together."""
    others = {"--temperature": parsed.temperature, "--batch-size": parsed.batch_size, "--seed": parsed.seed}
    if parsed.readjust is None:
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}: applies to --readjust N")
        return None
    if parsed.temperature is None:
        raise ValueError(f"--readjust {parsed.readjust}: give --temperature T, that of the samples to make later")
    chosen = {"batch_size": parsed.batch_size, "seed": parsed.seed}
    return Readjustment(
        parsed.readjust, parsed.temperature, **{name: value for name, value in chosen.items() if value is not None}
    )


def readjusted_content(content: ModelContent, how: Readjustment, device: torch.device | str = "cpu") -> ModelContent:
    """The model with batch norm's running statistics moved to those of samples of the prior.

    The fact `readjusted` states how. Classes of a conditional model take turns. Raises ValueError for a model without
    batch norm, one that was readjusted already, and one that is conditional on attributes.
    """
    if "readjusted" in content.facts:
        raise ValueError("--readjust: its batch norm was re-estimated already; use the model that this one came from")
    with torch.random.fork_rng():  # the initial weights are replaced
        model = build_model(content.recipe)
    check_batch_norm(model, content.recipe)
    dtype = next(tensor.dtype for tensor in content.weights.values() if tensor.is_floating_point())
    model.to(dtype).load_state_dict(content.weights)
    model.to(device)
    condition = _condition(content.recipe, how.batch_size)

    progress = Progress("batch norm", how.iterations, "batches", write=log.info)

    def noise(iteration: int) -> list[Tensor]:
        progress.update()
        positions = range(iteration * how.batch_size, (iteration + 1) * how.batch_size)
        return draw_noise(model.groups, how.seed, "readjust", positions, device, dtype)

    placed = None if condition is None else condition.to(device, dtype)
    with progress:
        readjust_batch_norm(model, noise, how.iterations, how.temperature, placed)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return replace(content, weights=weights, facts={**content.facts, "readjusted": asdict(how)})


def readjusted_model(
    trained: TrainedModel,
    count: int,
    condition_of: Callable[[Tensor], Tensor | None],
    temperature: TemperatureLike,
    seed: int,
    iterations: int,
) -> VAE:
    """A copy of the model whose batch norm's running statistics were moved to those of samples at this temperature.

    `count`: the number of samples to make later. `condition_of(numbers)`: the conditions (b, K) of these of them, or
    None. The statistics are of a random choice of them, at most IMAGES_PER_PASS. Each process computes all of it, so
    that the result does not depend on the number of processes. Raises ValueError for a model without batch norm.
    """
    check_batch_norm(trained.model, trained.recipe)
    model = copy.deepcopy(trained.model)
    numbers = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:IMAGES_PER_PASS]
    progress = Progress("batch norm", iterations, "batches", write=log.info, shown=collectives.process_rank() == 0)

    def noise(iteration: int) -> list[Tensor]:
        progress.update()
        advance()
        positions = range(iteration * len(numbers), (iteration + 1) * len(numbers))
        return draw_noise(model.groups, seed, "readjust", positions, trained.device, trained.dtype)

    with progress, collectives.alone():
        temperatures = resolve_temperature(temperature, model.groups)
        readjust_batch_norm(model, noise, iterations, temperatures, condition_of(numbers))
    return model


def check_batch_norm(model: VAE, recipe: Recipe) -> None:
    """Raises ValueError for a model without batch norm."""
    if not any(isinstance(module, BatchNorm2d) for module in model.modules()):
        raise ValueError(f"--readjust: model.name={recipe.model.name} has no batch norm with these settings")


def temperature_of(facts: Mapping[str, Any]) -> float:
    """The temperature that batch norm's statistics belong to; 1 unless they were re-estimated."""
    how = facts.get("readjusted")
    temperature = how.get("temperature") if isinstance(how, Mapping) else 1.0
    is_usable = isinstance(temperature, int | float) and 0 <= temperature < math.inf
    return float(temperature) if is_usable else 1.0


def _condition(recipe: Recipe, count: int) -> Tensor | None:
    """(count, K), a row for each sample; None for a model without a condition."""
    if recipe.condition is None:
        return None
    if not isinstance(recipe.condition, ClassCondition):
        raise ValueError("--readjust: the statistics depend on which attributes are sampled; use sample.py --readjust")
    classes = recipe.condition.num_classes
    return torch.eye(classes)[torch.arange(count) % classes]
