"""What all models have in common: the base class of their recipe section, and the interface that training uses.

Shape legend: B images, C channels, H x W pixels, G latent groups. Likelihoods and KL divergences are in nats.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.conditions import Condition
from pipeline.models.likelihoods import Likelihood, PixelDistribution
from pipeline.nn.recompute import recompute
from pipeline.schema import Section

Temperature = float | Sequence[float]
"""Scale of the priors' sigmas: one number, or one for each latent group in the order of sampling."""


class ModelConfig(Section):
    """The settings of one model. A subclass sets `name` and `likelihood`, adds its settings and implements `build`."""

    supports_regularizers: ClassVar[bool] = False
    """Whether the penalties of section `regularizers` support the model's layers."""

    name: str
    """The model."""
    if TYPE_CHECKING:  # at runtime a field of the subclass alone, listed after those of its architecture
        likelihood: Likelihood

    @property
    def classifier_folder(self) -> str | None:
        """Folder of the frozen classifier that training needs, or None.

        A section with a folder takes the loaded `FrozenClassifier` as argument `classifier` of `build`. A model built
        without it can be evaluated and sampled, but not trained.
        """
        return None

    def build(
        self, image_shape: tuple[int, int, int], border: int, bits: int, condition: Condition | None = None
    ) -> "VAE":
        """The model for padded images (C, H, W), of which `border` pixels on each side are padding.

        `bits`: color depth. Weights are initialized with torch's global generator. Raises ValueError for sizes or
        conditions that the model does not support.
        """
        raise NotImplementedError


class LatentGroup(NamedTuple):
    """One group of latent variables, sampled at once."""

    name: str
    """Resolution, and number within that resolution in the order of sampling: `8x8_group03`."""
    shape: tuple[int, int, int]
    """(channels, height, width) of the group's latent for one image."""


class VAEOutput(NamedTuple):
    """The terms of the evidence lower bound of each image.

    A NamedTuple rather than a dataclass, because Accelerate then converts its tensors to float32 under mixed precision.
    """

    log_px: Tensor
    """(B,) log p(x | z), nats."""
    kl: Tensor
    """(B, G) KL(posterior || prior) of each latent group, nats: analytic, or a one-sample estimate if there are
    flows."""
    log_qz: Tensor
    """(B,) log q(z | x) of the sampled latents, nats."""
    log_pz: Tensor
    """(B,) log p(z) of the sampled latents, nats."""
    kl_units: tuple[Tensor, ...]
    """G tensors (channels,): KL summed over space and averaged over the batch, nats. A unit is active above 0.1."""
    penalties: Mapping[str, Tensor] = {}
    """(B,) each: terms that the loss adds to the bound, already multiplied by their weights. Read only."""

    @property
    def elbo(self) -> Tensor:
        """(B,) evidence lower bound, nats, with weight one for every latent group."""
        return self.log_px - self.kl.sum(dim=1)


class VAE(nn.Module, ABC):
    """A variational autoencoder that takes its random numbers as an argument.

    `noise` is a list of standard normal tensors, one (B, *group.shape) per entry of `noise_groups`. The same images and
    noise give the same result on any number of processes. A conditional model (`condition_size` above 0) takes a
    condition (B, condition_size), encoded by `models.conditions`; other models take None.

    Constructor: `image_shape` (C, H, W) of the padded input, `border` pixels of padding on every side, `bits` of color
    depth. `bound` and `num_dimensions` leave out the border. A subclass sets `config` and `groups`.
    """

    config: ModelConfig
    groups: tuple[LatentGroup, ...]
    """In the order of sampling."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of the model's input."""
    num_dimensions: int
    """Number of image dimensions under the likelihood: the D of bits per dimension."""
    condition_size: int
    """Columns of the condition; 0 for an unconditional model."""

    def __init__(self, image_shape: tuple[int, int, int], border: int = 0, bits: int = 8, condition_size: int = 0):
        super().__init__()
        channels, height, width = self.image_shape = tuple(image_shape)
        self.border, self.bits, self.condition_size = border, bits, condition_size
        self.num_dimensions = channels * (height - 2 * border) * (width - 2 * border)

    @property
    def noise_groups(self) -> tuple[LatentGroup, ...]:
        """The noise that `forward` takes: one entry per latent group, then those that only training needs."""
        return self.groups

    def forward(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> VAEOutput:
        """Bound on log p(x | condition) for images x (B, C, H, W) in [0, 1]."""
        return self.bound(x, self.features(x, condition), noise, condition)

    @abstractmethod
    def features(self, x: Tensor, condition: Tensor | None = None) -> Any:
        """The part of the encoder that does not depend on noise, computed once for any number of posterior samples.

        Tensors (B, ...), alone or in lists, tuples and dicts, so that rows can be repeated for several samples.
        """

    @abstractmethod
    def bound(self, x: Tensor, features: Any, noise: Sequence[Tensor], condition: Tensor | None = None) -> VAEOutput:
        """`forward`, given the result of `features`."""

    @abstractmethod
    def encode(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        """Samples of the posterior of x, one (B, *group.shape) per group. Noise of zeros gives the posterior's mean."""

    @abstractmethod
    def pixel_distribution(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> PixelDistribution:
        """p(x | z) of whole images, border included, for latents (B, *group.shape), one per group."""

    def decode(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1]: the mean of p(x | z) for these latents."""
        return self.pixel_distribution(latents, condition).mean

    @abstractmethod
    def sample_with_latents(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        given: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Images (B, C, H, W) in [0, 1], the mean of p(x | z) for latents from the prior; and these latents, one
        (B, *group.shape) per group.

        `temperature` multiplies the sigmas of the prior. `given`: latents of the first groups, (B, *group.shape) each;
        the other groups are sampled from their priors given these. Noise and temperature of given groups are not used.
        Noise of zeros gives the priors' means.
        """

    @abstractmethod
    def prior_noise(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        """The noise, (B, *group.shape) each, for which `sample` at temperature 1 gives these latents.

        (z - mu) / sigma, with mu and sigma of each group's prior given the groups before it.
        """

    def sample(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        given: Sequence[Tensor] = (),
    ) -> Tensor:
        """The images of `sample_with_latents`."""
        return self.sample_with_latents(noise, temperature, condition, given)[0]

    def reconstruct(self, x: Tensor, noise: Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1]: the mean of p(x | z) for a posterior sample of each x."""
        return self.decode(self.encode(x, noise, condition), condition)

    def likelihood(self, outputs: Tensor) -> PixelDistribution:
        """p(x | z) from raw decoder outputs (B, num_outputs, H, W), with or without the border."""
        return self.config.likelihood.build(outputs, self.bits)

    def _log_px(self, x: Tensor, outputs: Tensor) -> Tensor:
        """(B,) log p(x | z) without the border, nats, for images x and raw decoder outputs with it."""
        likelihood = self.likelihood(without_border(outputs, self.border))
        return likelihood.log_prob(without_border(x, self.border)).flatten(1).sum(1)

    def compilable_cells(self) -> Iterator[nn.Module]:
        """The submodules that `train.compile` compiles, and `train.recompute=cells` recomputes, each on its own; none
        by default.
        """
        return iter(())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode; afterwards it has its former mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def use_channels_last(model: nn.Module) -> None:
    """Converts the convolution weights to channels_last memory format, which their activations then take over."""
    model.to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        if parameter.dim() == 4 and parameter.is_contiguous():
            # 1x1 and depthwise kernels are in both formats at once. DDP compares strides with those of the gradients,
            # which are the contiguous ones.
            plain = torch.empty(parameter.shape, device="meta").stride()
            parameter.data = parameter.data.as_strided(parameter.shape, plain)


def recomputable_methods(model: VAE) -> dict[str, list[tuple[nn.Module, str]]]:
    """By value of `train.recompute`: the modules and methods whose activations are recomputed."""
    return {
        "none": [],
        "norms": [(module, name) for module in model.modules() for name in getattr(module, "regions", ())],
        "cells": [(cell, "forward") for cell in model.compilable_cells()],
    }


def recompute_activations(model: VAE, what: Literal["none", "norms", "cells"]) -> None:
    """Makes backward passes in training recompute activations. Raises ValueError for what the model does not have."""
    methods = recomputable_methods(model)
    if what != "none" and not methods[what]:
        supported = ", ".join(name for name, found in methods.items() if found or name == "none")
        raise ValueError(f"train.recompute: {what} is not supported by this model; supported: {supported}")
    for module, name in methods[what]:
        recompute(module, name)


def compile_cells(model: VAE, backend: str = "inductor") -> None:
    """Compiles the model's cells one by one, each for the single input shape that it gets."""
    cells = list(model.compilable_cells())
    # Cells share their code, and the compiler gives up after 8 variants (shapes, training and evaluation) of one code.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(cells))
    for cell in cells:
        cell.compile(backend=backend, dynamic=False)


def check_divisible(image_shape: tuple[int, int, int], step: int, model: str, *other_fixes: str) -> None:
    """Raises ValueError, naming sizes that work, unless height and width (padding included) are multiples of step."""
    for size in image_shape[1:]:
        if size < step or size % step:
            below = size // step * step
            sizes = " or ".join(str(good) for good in (below, below + step) if good)
            fixes = ", ".join(("pad with data.pad", "convert the data set to another size", *other_fixes))
            raise ValueError(f"{model}: image size {size} is not a multiple of {step}; {sizes} would work: {fixes}")


def group_temperatures(temperature: Temperature, groups: Sequence[LatentGroup]) -> tuple[float, ...]:
    """The temperature of each group.

    Raises ValueError for another number of them than groups, and for one that is negative or not finite.
    """
    values = tuple(temperature) if isinstance(temperature, Sequence) else (temperature,) * len(groups)
    if len(values) != len(groups):
        raise ValueError(
            f"{len(values)} temperatures for {len(groups)} latent groups; give one number, or one for each group"
        )
    for value in values:
        if not 0 <= value < math.inf:
            raise ValueError(f"temperature {value}: must be a finite number of at least 0")
    return values


def check_condition(model: VAE, condition: Tensor | None) -> None:
    """Raises ValueError unless the condition has the model's `condition_size` columns (none: 0)."""
    given = 0 if condition is None else condition.shape[1]
    if given != model.condition_size:
        raise ValueError(f"the model takes a condition of {model.condition_size} columns, got {given}")


def without_border(images: Tensor, border: int) -> Tensor:
    """Images (B, C, H, W) without `border` pixels on each side."""
    height, width = images.shape[2:]
    return images[:, :, border : height - border, border : width - border]
