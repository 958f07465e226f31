"""An estimate of the memory that a training step takes on each device."""

import hashlib
import json
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipeline.config import without_defaults
from pipeline.models.base import VAE, recomputable_methods, recompute_activations
from pipeline.recipe import RECIPES, Recipe, build_model

COUNTED = RECIPES / "step_memory.json"
"""Figures of the shipped recipes, counted operator by operator: `python -m benchmarks.step_memory` writes them."""
MAX_TENSORS = 800
"""Models of more parameter tensors are not counted here: it would take more than a second."""
ROWS = 13
"""Images of the forward pass that is counted. What is saved with this number of rows grows with the batch."""


class StepMemory(NamedTuple):
    """Bytes on one device."""

    state: int
    """Weights, the optimizer's moments and the moving average."""
    gradients: int
    """All gradients. With several processes (in DDP's buckets) or several micro-batches they are there during every
    pass; else each is made in the backward pass, while activations are freed.
    """
    fixed: int
    """What else a pass adds at its peak whatever the number of images: normalized weights and temporary copies. The
    peak is at the end of the forward pass, before the first gradient. Nothing for VDVAE in float32, which uses the
    weights as they are.
    """
    per_image: int
    """What a pass adds for each image: activations."""
    accumulates: bool = False
    """Whether a step has several micro-batches."""

    def peak(self, images: int, processes: int = 1) -> int:
        """Of a step with this number of images per forward pass on this device."""
        held = self.gradients if processes > 1 or self.accumulates else 0
        # Few images may take less than the gradients, which are all there at the end of the backward pass.
        return self.state + max(held + self.fixed + images * self.per_image, self.gradients)


def estimate(recipe: Recipe, model: VAE | None = None) -> StepMemory | None:
    """From the figures counted for these settings; else from a forward pass without values, if the model is small
    enough and trains without a classifier; else None. Workspaces of convolutions and the allocator's rounding are not
    in it.

    `model`: the recipe's, on the meta device, where it has been built already; from then on it recomputes as the recipe
    says.
    """
    model = meta_model(recipe) if model is None else model
    weights = sum(tensor.numel() for tensor in model.parameters()) * (8 if recipe.train.precision == "fp64" else 4)
    state = weights * (3 + bool(recipe.train.ema_decay))
    counted = counted_figures().get(key_of(recipe, model))
    if counted is not None:
        return StepMemory(state, weights, counted["fixed"], counted["per_image"], recipe.train.micro_batches > 1)
    if len(list(model.parameters())) > MAX_TENSORS or recipe.model.classifier_folder is not None:
        return None
    recompute_activations(model, recipe.train.recompute)
    fixed, per_image = count_saved(model, {"bf16": 0.5, "fp32": 1, "fp64": 2}[recipe.train.precision])
    # Temporary tensors are not saved; as many bytes as the weights have stand for them.
    return StepMemory(state, weights, weights + fixed, per_image, recipe.train.micro_batches > 1)


def meta_model(recipe: Recipe) -> VAE:
    with torch.device("meta"):
        return build_model(recipe)


def kinds_of_recomputation(model: VAE) -> list[str]:
    """The values of `train.recompute` that the model supports."""
    return [what for what, methods in recomputable_methods(model).items() if methods or what == "none"]


@cache
def counted_figures() -> dict[str, dict[str, int]]:
    """{key: {"fixed": bytes, "per_image": bytes}}"""
    return json.loads(COUNTED.read_text())["figures"]


def key_of(recipe: Recipe, model: VAE) -> str:
    """A hash of the settings that a step's memory depends on, besides the number of images and of processes.

    A model's settings count where they differ from the defaults, so that a new one leaves the figures of others valid.
    """
    train = recipe.train
    facts = {
        "model": without_defaults(recipe.model),
        "parameters": [list(parameter.shape) for parameter in model.parameters()],
        "image": model.image_shape,
        "train": [train.precision, train.channels_last, train.recompute],
        "regularizers": recipe.regularizers.strength > 0,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def count_saved(model: VAE, scale: float) -> tuple[int, int]:
    """Bytes that a forward pass saves for backward: whatever the batch, and for each image.

    `model` is on the meta device and in float32; `scale` is the ratio of its activations' bytes to that.
    """
    saved: dict[int, tuple[int, bool]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes(), tensor.shape[:1] == (ROWS,)
        return tensor

    x = torch.empty(ROWS, *model.image_shape, device="meta")
    noise = [torch.empty(ROWS, *group.shape, device="meta") for group in model.noise_groups]
    condition = torch.empty(ROWS, model.condition_size, device="meta") if model.condition_size else None
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x, noise, condition)
    for tensor in [*model.parameters(), *model.buffers()]:
        saved.pop(tensor.untyped_storage()._cdata, None)
    del out
    fixed = sum(size for size, grows in saved.values() if not grows)
    per_image = sum(size for size, grows in saved.values() if grows) / ROWS
    return round(fixed * scale), round(per_image * scale)


def readable(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
