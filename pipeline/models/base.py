"""What every model of this project has in common: its section of a recipe, and the interface that training uses.

Shape legend: B images, C channels, H x W pixels, G latent groups. Likelihoods and KL divergences are in nats.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from pipeline.models.conditions import Condition
from pipeline.schema import Section


class ModelConfig(Section):
    """The settings of one model. A subclass fixes `name`, adds its settings and implements `build`."""

    supports_regularizers: ClassVar[bool] = False
    """Whether the penalties of section `regularizers` apply to the model's layers."""

    name: str
    """Which model."""

    @property
    def classifier_folder(self) -> str | None:
        """Folder of the frozen classifier that training needs; None where it needs none.

        Where it is set, `build` takes the `FrozenClassifier` as `classifier`; without it the model is for inference.
        """
        return None

    def build(
        self, image_shape: tuple[int, int, int], border: int, bits: int, condition: Condition | None = None
    ) -> "VAE":
        """The model for padded images (C, H, W), of which `border` pixels on each side are padding.

        `bits`: color depth. Weights come from torch's global generator. Raises ValueError for sizes or conditions that
        the model cannot take.
        """
        raise NotImplementedError


class LatentGroup(NamedTuple):
    """One group of latent variables that are drawn together."""

    name: str
    """Resolution, and number within that resolution in drawing order: `8x8_group03`."""
    shape: tuple[int, int, int]
    """(channels, height, width) of the group's latent for one image."""


class VAEOutput(NamedTuple):
    """The terms of the evidence lower bound, image by image.

    A NamedTuple rather than a dataclass: Accelerate returns its tensors to float32 under mixed precision.
    """

    log_px: Tensor
    """(B,) log p(x | z), nats."""
    kl: Tensor
    """(B, G) KL of posterior from prior per latent group, nats: analytic, or a one-sample estimate where flows make
    it so."""
    log_qz: Tensor
    """(B,) log q(z | x) of the latents drawn, nats."""
    log_pz: Tensor
    """(B,) log p(z) of the latents drawn, nats."""
    kl_units: tuple[Tensor, ...]
    """G tensors (channels,): KL summed over space, averaged over the batch, nats. A unit counts as active above 0.1."""
    penalties: Mapping[str, Tensor] = {}
    """(B,) each: terms of the model's own that the loss takes beside the bound, weights included. Read only."""

    @property
    def elbo(self) -> Tensor:
        """(B,) evidence lower bound, nats, every latent group with weight one."""
        return self.log_px - self.kl.sum(dim=1)


class VAE(nn.Module, ABC):
    """A variational autoencoder whose randomness is an argument.

    Every random draw comes in as standard normal noise, one tensor (B, *group.shape) per entry of `noise_groups`, so
    that the same images and noise give the same result on any number of processes. A conditional model
    (`condition_size` above 0) takes a condition (B, condition_size) as `models.conditions` makes it; others None.
    """

    groups: tuple[LatentGroup, ...]
    """In drawing order."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of the model's input."""
    num_dimensions: int
    """Number of image dimensions that the likelihood counts: the D of bits per dimension."""
    condition_size: int = 0
    """Columns of the condition; 0: the model takes none."""

    @property
    def noise_groups(self) -> tuple[LatentGroup, ...]:
        """What noise `forward` takes: the latent groups, and after them what else a model draws while it trains."""
        return self.groups

    def forward(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> VAEOutput:
        """Bound on log p(x | condition) for images x (B, C, H, W) in [0, 1]."""
        return self.bound(x, self.features(x, condition), noise, condition)

    @abstractmethod
    def features(self, x: Tensor, condition: Tensor | None = None) -> Any:
        """The encoder's part that no latent draw changes: computed once for any number of draws.

        Tensors (B, ...), alone or in lists, tuples and dicts, so that rows can be repeated for several draws.
        """

    @abstractmethod
    def bound(self, x: Tensor, features: Any, noise: Sequence[Tensor], condition: Tensor | None = None) -> VAEOutput:
        """`forward` from `features` on."""

    @abstractmethod
    def encode(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        """Latents drawn from the posterior of x, one (B, *group.shape) per group. Noise of zeros gives its mean."""

    @abstractmethod
    def decode(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1]: the decoder's mean for these latents."""

    @abstractmethod
    def sample(self, noise: Sequence[Tensor], temperature: float = 1.0, condition: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1] from the prior: the decoder's mean.

        The priors' sigmas are scaled by `temperature`.
        """

    def reconstruct(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1]: the decoder's mean given a posterior sample for each x."""
        return self.decode(self.encode(x, noise, condition), condition)

    def compilable_cells(self) -> Iterator[nn.Module]:
        """The submodules that `train.compile` compiles one by one; none by default."""
        return iter(())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode; afterwards in the mode that it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_temperature(temperature: float) -> None:
    """Raises ValueError for a temperature that is negative or not finite."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature}: must be a finite number of at least 0")


def check_condition(model: VAE, condition: Tensor | None) -> None:
    """Raises ValueError where a conditional model is told nothing, or anything does not fit its `condition_size`."""
    given = 0 if condition is None else condition.shape[1]
    if given != model.condition_size:
        raise ValueError(f"the model takes a condition of {model.condition_size} columns, got {given}")


def without_border(images: Tensor, border: int) -> Tensor:
    """Images (B, C, H, W) less `border` pixels on each side."""
    height, width = images.shape[2:]
    return images[:, :, border : height - border, border : width - border]
