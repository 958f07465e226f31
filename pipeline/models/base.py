"""What every VAE of this project is to the trainer.

Shape legend: B images, C channels, H x W pixels, G latent groups. Likelihoods and KL divergences are in nats.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


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

    @property
    def elbo(self) -> Tensor:
        """(B,) evidence lower bound, nats, every latent group with weight one."""
        return self.log_px - self.kl.sum(dim=1)


class VAE(nn.Module, ABC):
    """A variational autoencoder whose randomness is an argument.

    Every random draw comes in as standard normal noise, one tensor (B, *group.shape) per latent group in drawing order,
    so that the same images and noise give the same result on any number of processes.
    """

    groups: tuple[LatentGroup, ...]
    image_shape: tuple[int, int, int]
    """(C, H, W) of the model's input."""
    num_dimensions: int
    """Number of image dimensions that the likelihood counts: the D of bits per dimension."""

    @abstractmethod
    def forward(self, x: Tensor, noise: Sequence[Tensor]) -> VAEOutput:
        """Bound on log p(x) for images x (B, C, H, W) in [0, 1]."""

    @abstractmethod
    def sample(self, noise: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Images (B, C, H, W) in [0, 1] from the prior: the decoder's mean.

        The priors' sigmas are scaled by `temperature`.
        """

    @abstractmethod
    def reconstruct(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """Images (B, C, H, W) in [0, 1]: the decoder's mean given a posterior sample for each x."""

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
