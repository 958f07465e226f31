"""What a training step that runs out of memory says: which settings take less, and how much, by the estimate."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.distributed.runtime import Runtime
from pipeline.recipe import Recipe
from pipeline.run.micro_batch import candidates, with_micro_batch
from pipeline.run.step_memory import estimate, readable


class OutOfMemory(Exception):
    """A device's memory was too small for the run."""


@contextmanager
def explained(recipe: Recipe, runtime: Runtime) -> Iterator[None]:
    """Raises OutOfMemory with the settings that help in place of torch's error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the failed step's tensors, since the advice needs memory too
        raise OutOfMemory(advice(recipe, runtime, error)) from error


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """On a GPU, or in host memory, for which torch has no type of its own."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator: can't allocate memory" in str(error)


def advice(recipe: Recipe, runtime: Runtime, error: RuntimeError) -> str:
    """One line: what happened, and what smaller settings would need."""
    world_size, now = runtime.world_size, recipe.train.images_per_pass
    problem = str(error).partition(". GPU")[0].partition("\n")[0].rstrip(".")
    smaller = [size for size in candidates(recipe, world_size) if size < now][:2]
    options = {f"train.micro_batch={size}": with_micro_batch(recipe, size) for size in smaller}
    options |= {f"train.recompute={what}": recomputing(recipe, what) for what in stronger_recomputation(recipe)}
    known = {"as it is": recipe} | options
    needs = {name: peak(one, world_size) for name, one in known.items()}
    listed = "; ".join(f"{name}: {need}" for name, need in needs.items())
    return (
        f"out of memory on {runtime.device_name} with {now // world_size} images per process and forward pass "
        f"({problem}); estimated memory of a step, {listed}"
    )


def peak(recipe: Recipe, world_size: int) -> str:
    """Of a step on each device."""
    try:
        found = estimate(recipe)
    except (RuntimeError, MemoryError):  # there is not even memory for that
        found = None
    return (
        "not known" if found is None else readable(found.peak(recipe.train.images_per_pass // world_size, world_size))
    )


def stronger_recomputation(recipe: Recipe) -> list[str]:
    """Values of train.recompute that the model has and that save more than the present one."""
    order = ["none", "norms", "cells"]
    found = []
    for what in order[order.index(recipe.train.recompute) + 1 :]:
        try:
            Recipe.model_validate(recomputing(recipe, what).model_dump())
        except ValueError:  # the model has none of it
            continue
        found.append(what)
    return found


def recomputing(recipe: Recipe, what: str) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"recompute": what})})
