"""`train.micro_batch=auto`: the largest micro-batch that fits in memory, found once, before a run's first step.

On GPUs steps are tried, from the largest micro-batch down, with a model that is thrown away afterwards; on CPUs the
estimate is compared with the available memory. The number is part of the run from then on: it sets what batch norm
sees, so it stands in config.yaml and in the checkpoints, and a resumed run uses it.
"""

import gc
import logging
import os
from pathlib import Path

import torch

from pipeline.distributed import collectives
from pipeline.distributed.runtime import Runtime
from pipeline.models.noise import draw_noise
from pipeline.recipe import Recipe, divisors
from pipeline.run.build import build_training_model
from pipeline.run.classifier_folder import load_frozen_classifier
from pipeline.run.step_memory import estimate
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import UnreadableCheckpoint, read_meta
from pipeline.storage.run_id import find_run_id
from pipeline.training.ema import EMA
from pipeline.training.optim import build_optimizer
from pipeline.training.regularizers import Regularizers
from pipeline.training.state import TrainingState

log = logging.getLogger("pipeline")

USABLE = 0.92
"""Share of a device's memory that a tried step may take: the allocator's fragments and NCCL's buffers need the rest."""


def resolve_micro_batch(recipe: Recipe, runtime: Runtime, folder: Path) -> Recipe:
    """The recipe with a number instead of `auto`: that of the run's checkpoints, else the largest that fits on every
    rank. Raises ValueError on every rank where none fits.
    """
    if recipe.train.micro_batch != "auto":
        return recipe
    stored = runtime.run_on_main(lambda: stored_micro_batch(folder), "reading a checkpoint")
    number = runtime.from_main(stored)
    if number is None:
        found = runtime.run_on_all(lambda: largest_that_fits(recipe, runtime), "trying sizes of train.micro_batch")
        number = min(runtime.gather_objects(found))
        runtime.run_on_all(lambda: check_found(number, recipe, runtime), "trying sizes of train.micro_batch")
    log.info("train.micro_batch=auto is %d (%d images per process)", number, number // runtime.world_size)
    return with_micro_batch(recipe, number)


def with_micro_batch(recipe: Recipe, number: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": number})})


def stored_micro_batch(folder: Path) -> int | None:
    """The micro-batch that the run's newest readable checkpoint was made with; None where there is no checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints", run_id=find_run_id(folder))
    for step in reversed(checkpoints.own_steps()):
        try:
            train = read_meta(checkpoints.path(step)).facts["settings"]["train"]
        except (UnreadableCheckpoint, KeyError, TypeError):
            continue
        return train.get("micro_batch") or train.get("batch_size")
    return None


def candidates(recipe: Recipe, world_size: int) -> list[int]:
    """Micro-batches that divide the batch and that the processes share equally, largest first."""
    return [size for size in reversed(divisors(recipe.train.batch_size)) if size % world_size == 0]


def largest_that_fits(recipe: Recipe, runtime: Runtime) -> int:
    """On this process's device; 0 where none does. No collective."""
    for size in candidates(recipe, runtime.world_size):
        if fits(recipe, runtime, size // runtime.world_size):
            return size
    return 0


def check_found(number: int, recipe: Recipe, runtime: Runtime) -> None:
    """Raises ValueError where no size fits."""
    if number == 0:
        smallest = candidates(recipe, runtime.world_size)[-1:]
        tried = f"not even {smallest[0]} images" if smallest else f"{runtime.world_size} processes cannot share it"
        raise ValueError(
            f"train.micro_batch=auto: no micro-batch of train.batch_size={recipe.train.batch_size} fits on "
            f"{runtime.device_name} ({tried}); use a smaller model, more processes, or train.recompute=cells"
        )


def fits(recipe: Recipe, runtime: Runtime, images: int) -> bool:
    """Whether a step with this number of images on this process fits on its device."""
    if runtime.device.type != "cuda":
        expected = estimate(with_micro_batch(recipe, images * runtime.world_size))
        return expected is None or expected.peak(images, runtime.world_size) < USABLE * available_bytes()
    torch.cuda.set_per_process_memory_fraction(USABLE, runtime.device)
    try:
        take_trial_step(recipe, runtime, images)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, runtime.device)
    return True


def take_trial_step(recipe: Recipe, runtime: Runtime, images: int) -> None:
    """A whole training step of a model of its own on black images, without the other processes."""
    train, device = recipe.train, runtime.device
    folder = recipe.model.classifier_folder
    model = build_training_model(recipe, runtime, load_frozen_classifier(folder) if folder else None)
    accumulates = images * runtime.world_size < train.batch_size
    # DDP has the gradients in buckets all the time; without it, those of the micro-batches before are there.
    gradients = [torch.empty_like(p) for p in model.parameters()] if runtime.world_size > 1 or accumulates else []
    ema = EMA(model, train.ema_decay) if train.ema_decay else None
    regularizers = Regularizers(recipe.regularizers, model, train.seed)
    state = TrainingState(model, build_optimizer(model, recipe.optim), regularizers, ema)
    x = torch.zeros(images, *model.image_shape, device=device, dtype=runtime.dtype)
    condition = x.new_zeros(images, model.condition_size) if model.condition_size else None
    noise = draw_noise(model.noise_groups, train.seed, "train", range(images), device, runtime.dtype)
    if train.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with collectives.alone():
        with runtime.autocast():
            out = model(x, noise, condition)
        loss = (out.kl.float().sum(1) - out.log_px + sum(out.penalties.values())).mean() + state.regularizers(1.0)[0]
        loss.backward()
    state.apply_update(0)
    del gradients


def available_bytes() -> int:
    """Host memory that each process of this machine may still take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
