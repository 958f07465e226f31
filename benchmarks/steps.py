"""Trainers of whole recipes with images in memory, for the benchmarks and checks that take training steps."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.distributed.runtime import Runtime
from pipeline.recipe import Recipe, load_recipe, recipe_path
from pipeline.run.build import build_runtime, build_trainer
from pipeline.run.data import RunData
from pipeline.training.trainer import Trainer

EPOCH_SIZES = {
    "nvae_mnist": 60_000,
    "nvae_cifar10": 50_000,
    "nvae_celeba64": 162_770,
    "nvae_imagenet32": 1_281_167,
    "nvae_celebahq256": 27_000,
    "nvae_ffhq256": 63_000,
}
"""Training images of the recipes of the paper; the schedules depend on it."""

IMAGES_PER_GPU = {
    "nvae_mnist": 200,
    "nvae_cifar10": 32,
    "nvae_celeba64": 16,
    "nvae_imagenet32": 24,
    "nvae_celebahq256": 4,
    "nvae_ffhq256": 4,
}
"""The paper's batch on each of its GPUs (table 6)."""

VDVAE_IMAGES_PER_GPU = {"vdvae_cifar10": 16, "vdvae_imagenet32": 8, "vdvae_imagenet64": 4, "vdvae_ffhq256": 1}
"""The batch of VDVAE's release on each of its GPUs."""

COUNTED = tuple(name for name in IMAGES_PER_GPU if name != "nvae_ffhq256")
"""Recipes whose steps are counted. A step of nvae_ffhq256 takes what one of nvae_celebahq256 takes."""

SMALL = (
    "model={name: nvae, groups_per_scale: [1, 2], encoder_channels: 4, decoder_channels: 4, latent_channels: 2, "
    "num_preprocess_cells: 1, num_postprocess_cells: 1, num_encoder_cells: 1, num_decoder_cells: 1, num_flows: 1, "
    "likelihood: {name: logistic_mixture, num_components: 2}}",
    "data.size=16",
    "train.ema_decay=0.9",
    "train.cpu_threads=1",
    "optim.warmup_epochs=0",
)
"""Overrides of nvae_cifar10 for a model with all its parts that trains in a few seconds anywhere."""


class MemoryData(RunData):
    """A `TrainingData` of images in memory. Its model inputs are those of a run."""

    def __init__(self, recipe: Recipe, runtime: Runtime, epoch_size: int, images: Tensor | None = None):
        """`images`: (n, C, H, W) uint8, padded, repeated for ever; by default synthetic ones."""
        data, pool = recipe.data, 4 * recipe.train.images_per_pass
        side = data.size + 2 * data.pad
        self.recipe, self.runtime = recipe, runtime
        self.order = SimpleNamespace(epoch_size=epoch_size)
        images = synthetic_images(pool, data.channels, side) if images is None else images
        self._images = images.pin_memory() if runtime.device.type == "cuda" else images

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's share of the micro-batches from optimizer step `step` on."""
        size, rank, world = self.recipe.train.images_per_pass, self.runtime.rank, self.runtime.world_size
        first = step * self.recipe.train.batch_size
        while True:
            positions = first + torch.arange(size * rank // world, size * (rank + 1) // world)
            chosen = positions % len(self._images)
            first += size
            yield Batch(self._images[chosen], positions, positions, chosen, -torch.ones_like(chosen), torch.empty(0, 0))


def synthetic_images(count: int, channels: int, side: int) -> Tensor:
    """(count, C, side, side) uint8: smooth color fields with some noise; one channel: black and white shapes."""
    generator = torch.Generator().manual_seed(0)
    fields = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(fields, size=(side, side), mode="bilinear")
    if channels == 1:
        return (smooth > 0.5).to(torch.uint8) * 255
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return (255 * noisy.clamp(0, 1)).to(torch.uint8)


def read_recipe(name: str, *overrides: str) -> Recipe:
    """A recipe of the project with some settings changed. Raises ValueError for a setting that there is not."""
    return load_recipe(recipe_path(name), list(overrides))


def small_recipe(*overrides: str) -> Recipe:
    """Of eight images per step."""
    return read_recipe("nvae_cifar10", *SMALL, "train.batch_size=8", "train.precision=fp32", *overrides)


def one_gpu_recipe(name: str, tiny: bool, *overrides: str) -> Recipe:
    """A recipe of the paper with the paper's batch of one GPU; `tiny`: a small model in its place."""
    if tiny:
        return small_recipe(*overrides)
    return read_recipe(name, f"train.batch_size={IMAGES_PER_GPU[name]}", *overrides)


def new_runtime(recipe: Recipe) -> Runtime:
    """This process's runtime, after others with other settings."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return build_runtime(recipe.train)


def new_trainer(
    recipe: Recipe, runtime: Runtime | None = None, epoch_size: int = 50_000, images: Tensor | None = None
) -> Trainer:
    """At step 0, with initial weights that depend on the recipe's seed alone."""
    runtime = runtime or new_runtime(recipe)
    return build_trainer(recipe, runtime, MemoryData(recipe, runtime, epoch_size, images))


def train(trainer: Trainer, count: int, after: Callable[[], None] = lambda: None) -> int:
    """Takes steps from the trainer's step on. `after` is called after each. Returns how many were skipped."""
    stream, skipped = iter(trainer.data.batches(trainer.step)), trainer.progress.skipped_steps
    for _ in range(count):
        reason = trainer.train_step(trainer.step, list(islice(stream, trainer.config.micro_batches)))
        trainer.progress.count_step(reason, count + 1)
        after()
    return trainer.progress.skipped_steps - skipped


def without_compiling(tiny: bool) -> AbstractContextManager:
    """Where `tiny`, compiled code runs uncompiled in this context: compiling takes a minute."""
    return torch.compiler.set_stance("force_eager") if tiny else nullcontext()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_per_step(trainer: Trainer, warm_up: int, count: int) -> float:
    """The median over three rounds of `count` steps."""
    train(trainer, warm_up)
    rounds = []
    for _ in range(3):
        synchronize()
        start = time.perf_counter()
        train(trainer, count)
        synchronize()
        rounds.append((time.perf_counter() - start) / count)
    return statistics.median(rounds)


def sample_noise(model: torch.nn.Module, count: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """For `count` images, sampled on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, *group.shape) for group in model.noise_groups]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def free_memory() -> None:
    """Of trainers that nobody holds any more, and what the compiler keeps; peak memory is counted from here on."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Largest memory of tensors since `free_memory`, GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
