"""Pictures during training: prior samples at several temperatures, and reconstructions of held-out images."""

import copy
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipeline.models.base import VAE, Temperature, evaluating
from pipeline.models.conditions import ClassCondition, Condition
from pipeline.models.noise import draw_noise
from pipeline.schema import Section


class SamplesConfig(Section):
    """When pictures are made, and how."""

    every: int = Field(1000, ge=0)
    """Steps between sample grids; also after the last step. 0: never."""
    count: int = Field(64, gt=0)
    """Pictures in a grid of prior samples. Class-conditional models sample about this number, in rows of equal length,
    one per class; attribute-conditional models use the attributes of held-out images."""
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = (0.7, 1.0)
    """Scale of the priors' sigmas, a grid for each."""
    reconstructions: int = Field(16, ge=0)
    """Held-out images shown above their reconstructions."""
    readjust_iterations: int = Field(0, ge=0)
    """Batches of prior samples that re-estimate batch norm's running statistics, on a copy, for each temperature before
    sampling. The reference release's sampling tool uses 500."""


class Grid(NamedTuple):
    """The n pictures of a grid of prior samples, row by row."""

    positions: Sequence[int]
    """Of each picture's noise; pictures of equal position share it."""
    condition: Tensor | None
    """(n, K)."""
    columns: int


def plan_grid(count: int, condition: Condition | None, held_out: Tensor | None) -> Grid:
    """The grid of `count` samples; `held_out` (n, K) are the conditions of real images.

    By class: a row per class, a column per draw of the latent, so that a column shows one latent in every class.
    """
    if isinstance(condition, ClassCondition):
        classes = condition.num_classes
        columns = max(1, count // classes)
        one_hot = torch.eye(classes).repeat_interleave(columns, dim=0)  # (classes * columns, classes)
        return Grid(list(range(columns)) * classes, one_hot, columns)
    conditions = None if held_out is None else held_out.repeat(-(-count // len(held_out)), 1)[:count]
    return Grid(range(count), conditions, 8)


def readjust_batch_norm(
    model: VAE,
    noise: Callable[[int], Sequence[Tensor]],
    iterations: int,
    temperature: Temperature,
    condition: Tensor | None = None,
) -> None:
    """Moves the decoder's running statistics towards those of prior samples at `temperature`, in place.

    `noise(i)` gives the noise of iteration i. The encoder's statistics do not change: prior samples do not use it.
    Leaves the model in eval mode.
    """
    model.train()
    with torch.no_grad():
        for iteration in range(iterations):
            model.sample(noise(iteration), temperature, condition)
    model.eval()


class Pictures:
    """Grids of samples and reconstructions. The noise is the same at every call, so that grids of successive steps show
    the same latents.
    """

    def __init__(self, config: SamplesConfig, seed: int, device: torch.device, dtype: torch.dtype, autocast: Callable):
        self.config = config
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.autocast = autocast

    @torch.no_grad()
    def samples(self, model: VAE, grid: Grid) -> dict[str, Tensor]:
        """{"samples/temperature_0.7": (n, C, H, W) in [0, 1]} for each temperature. The model is not changed."""
        condition = self._placed(grid.condition)
        noise = self._noise(model, "sample", grid.positions)
        pictures = {}
        for temperature in self.config.temperatures:
            used = self._readjusted(model, temperature, condition) if self.config.readjust_iterations else model
            with evaluating(used), self.autocast():
                images = used.sample(noise, temperature, condition)
            pictures[f"samples/temperature_{temperature:g}"] = images.float().cpu()
        return pictures

    @torch.no_grad()
    def reconstructions(self, model: VAE, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, H, W) in [0, 1] for images x. The model is not changed."""
        noise = self._noise(model, "reconstruct", range(len(x)))
        with evaluating(model), self.autocast():
            images = model.reconstruct(x, noise, condition)
        return images.float().cpu()

    def _readjusted(self, model: VAE, temperature: float, condition: Tensor | None) -> VAE:
        model = copy.deepcopy(model)
        count = self.config.count if condition is None else len(condition)
        with self.autocast():
            readjust_batch_norm(
                model,
                lambda i: self._noise(model, "readjust", range(i * count, (i + 1) * count)),
                self.config.readjust_iterations,
                temperature,
                condition,
            )
        return model

    def _placed(self, condition: Tensor | None) -> Tensor | None:
        return None if condition is None else condition.to(self.device, self.dtype)

    def _noise(self, model: VAE, stream: str, positions: Sequence[int]) -> list[Tensor]:
        return draw_noise(model.groups, self.seed, stream, positions, self.device, self.dtype)
