"""An estimate of the memory that a training step takes on each device."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipeline.config import without_defaults
from pipeline.models.base import VAE, recomputable_methods
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

    `model`: the recipe's, on the meta device, where it has been built already.
    """
    model = meta_model(recipe) if model is None else model
    weights = sum(tensor.numel() for tensor in model.parameters()) * (8 if recipe.train.precision == "fp64" else 4)
    state = weights * (3 + bool(recipe.train.ema_decay))
    counted = counted_figures().get(key_of(recipe, model))
    if counted is not None:
        return StepMemory(state, weights, counted["fixed"], counted["per_image"], recipe.train.micro_batches > 1)
    if len(list(model.parameters())) > MAX_TENSORS or recipe.model.classifier_folder is not None:
        return None
    recomputed = recomputable_methods(model)[recipe.train.recompute]
    fixed, per_image = count_saved(model, {"bf16": 0.5, "fp32": 1, "fp64": 2}[recipe.train.precision], recomputed)
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


class SavedBytes:
    """Bytes by storage of what a forward pass of ROWS images saves for backward."""

    def __init__(self) -> None:
        self.fixed: dict[int, int] = {}
        self.growing: dict[int, tuple[torch.UntypedStorage, int]] = {}
        """With the method whose recomputation makes them; 0: they are kept. Held, so that no other gets their place."""
        self._running = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """For `saved_tensors_hooks`."""
        self._save(tensor, self._running)
        return tensor

    def tracked(self, number: int, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, of which only the inputs are kept. `number`: from 1."""

        def run(*inputs: Tensor | None) -> Any:
            for tensor in inputs:
                if tensor is not None:
                    self._save(tensor, 0)
            self._running = number
            result = method(*inputs)
            self._running = 0
            return result

        return run

    def _save(self, tensor: Tensor, method: int) -> None:
        storage = tensor.untyped_storage()
        if tensor.shape[:1] != (ROWS,):
            self.fixed[storage._cdata] = storage.nbytes()
        elif method == 0 or storage._cdata not in self.growing:
            self.growing[storage._cdata] = storage, method

    def peak_of_growing(self) -> int:
        """What is kept, and what the largest method makes: backward runs one at a time again."""
        by_method: Counter[int] = Counter()
        for storage, method in self.growing.values():
            by_method[method] += storage.nbytes()
        return by_method.pop(0, 0) + max(by_method.values(), default=0)


def count_saved(model: VAE, scale: float, recomputed: Sequence[tuple[nn.Module, str]] = ()) -> tuple[int, int]:
    """Bytes that are saved for backward: whatever the batch, and for each image.

    `model` is on the meta device and in float32; `scale` is the ratio of its activations' bytes to that. `recomputed`:
    modules and methods that backward runs again.
    """
    saved = SavedBytes()
    for number, (module, name) in enumerate(recomputed, start=1):
        setattr(module, name, saved.tracked(number, getattr(module, name)))
    x = torch.empty(ROWS, *model.image_shape, device="meta")
    noise = [torch.empty(ROWS, *group.shape, device="meta") for group in model.noise_groups]
    condition = torch.empty(ROWS, model.condition_size, device="meta") if model.condition_size else None
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        out = model(x, noise, condition)
    for module, name in recomputed:
        delattr(module, name)
    for tensor in [*model.parameters(), *model.buffers()]:
        saved.fixed.pop(tensor.untyped_storage()._cdata, None)
    del out
    return round(sum(saved.fixed.values()) * scale), round(saved.peak_of_growing() / ROWS * scale)


def readable(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
