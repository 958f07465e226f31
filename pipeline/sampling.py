"""Pictures during training: prior samples at several temperatures, and reconstructions of held-out images."""

import copy
from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from pipeline.models.base import VAE, evaluating
from pipeline.noise import draw_noise
from pipeline.schema import Section


class SamplesConfig(Section):
    """When pictures are drawn and how."""

    every: int = Field(1000, ge=0)
    """Steps between sample grids; also after the last step. 0: never."""
    count: int = Field(64, gt=0)
    """Pictures in a grid of prior samples."""
    temperatures: tuple[float, ...] = (0.7, 1.0)
    """Scale of the priors' sigmas, a grid for each."""
    reconstructions: int = Field(16, ge=0)
    """Held-out images shown above their reconstructions."""
    readjust_iterations: int = Field(0, ge=0)
    """Batches of prior samples that re-estimate batch norm's running statistics, on a copy, for each temperature before
    drawing. The reference release's sampling tool uses 500."""


def readjust_batch_norm(
    model: VAE, noise: Callable[[int], Sequence[Tensor]], iterations: int, temperature: float
) -> None:
    """Moves the decoder's running statistics towards those of prior samples at `temperature`, in place.

    `noise(i)` gives the noise of iteration i. The encoder's statistics stay, since prior samples do not pass it.
    Leaves the model in eval mode.
    """
    model.train()
    with torch.no_grad():
        for iteration in range(iterations):
            model.sample(noise(iteration), temperature)
    model.eval()


class Pictures:
    """Draws the same noise at every call, so that grids of successive steps show one and the same picture growing."""

    def __init__(self, config: SamplesConfig, seed: int, device: torch.device, dtype: torch.dtype, autocast: Callable):
        self.config = config
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.autocast = autocast

    @torch.no_grad()
    def samples(self, model: VAE) -> dict[str, Tensor]:
        """{"samples/temperature_0.7": (count, C, H, W) in [0, 1]} for each temperature. The model is left as it was."""
        pictures = {}
        for temperature in self.config.temperatures:
            drawer = self._readjusted(model, temperature) if self.config.readjust_iterations else model
            with evaluating(drawer), self.autocast():
                drawn = drawer.sample(self._noise(model, "sample", 0), temperature)
            pictures[f"samples/temperature_{temperature:g}"] = drawn.float().cpu()
        return pictures

    @torch.no_grad()
    def reconstructions(self, model: VAE, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] for images x. The model is left as it was."""
        noise = draw_noise(model.groups, self.seed, "reconstruct", range(len(x)), self.device, self.dtype)
        with evaluating(model), self.autocast():
            drawn = model.reconstruct(x, noise)
        return drawn.float().cpu()

    def _readjusted(self, model: VAE, temperature: float) -> VAE:
        model = copy.deepcopy(model)
        with self.autocast():
            readjust_batch_norm(
                model,
                lambda i: self._noise(model, "readjust", i * self.config.count),
                self.config.readjust_iterations,
                temperature,
            )
        return model

    def _noise(self, model: VAE, stream: str, start: int) -> list[Tensor]:
        positions = range(start, start + self.config.count)
        return draw_noise(model.groups, self.seed, stream, positions, self.device, self.dtype)
