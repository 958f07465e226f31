"""A VAE of strided convolutions, as in many tutorials (Kingma & Welling 2014, arXiv:1312.6114).

    encoder   conv k4 s2 p1: C-32-64-128, ReLU after each; flattened to 8192 features at 64 px
    decoder   linear to 128 x H/8 x W/8; transposed conv k4 s2 p1: 128-64-32-C, ReLU between

Strided convolutions without pooling are DCGAN's architecture (Radford et al. 2016, arXiv:1511.06434). A condition is
concatenated to the flattened features and to the latent.
"""

from itertools import pairwise
from math import prod
from typing import Literal

from torch import Tensor, nn

from pipeline.models.base import check_divisible
from pipeline.models.conditions import Condition
from pipeline.models.likelihoods import Likelihood, SquaredErrorLikelihood
from pipeline.models.vector_vae import TORCH_MOMENTUM, VectorVAE, VectorVAEConfig, concatenated
from pipeline.nn.batch_norm import BatchNorm2d
from pipeline.nn.posterior import Posterior
from pipeline.schema import Count

HALVINGS = 3
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


class ConvVAEConfig(VectorVAEConfig):
    """Architecture of a convolutional VAE. The defaults are the tutorials' 3-32-64-128, 8192-(128, 128) at 64 px."""

    name: Literal["conv_vae"] = "conv_vae"
    latent_size: Count = 128
    """Units of the latent vector."""
    likelihood: Likelihood = SquaredErrorLikelihood()
    """p(x | z)."""
    width: Count = 32
    """Channels of the first convolution. Each of the next two has twice as many."""
    batch_norm: bool = False
    """Batch norm after every convolution but the last. The normalized convolutions have no bias."""
    activation: Literal["relu", "leaky_relu"] = "relu"
    """Activation function. `leaky_relu` has slope 0.01 below 0."""

    def build(
        self, image_shape: tuple[int, int, int], border: int, bits: int, condition: Condition | None = None
    ) -> "ConvVAE":
        """The model for padded images of this shape. Raises ValueError for a size that is not a multiple of 8."""
        return ConvVAE(self, image_shape, border, bits, condition.size if condition else 0)


class ConvVAE(VectorVAE):
    """The model described at the top of this file. Raises ValueError unless height and width are multiples of 8."""

    config: ConvVAEConfig

    def __init__(self, config: ConvVAEConfig, image_shape: tuple[int, int, int], *context):
        super().__init__(config, image_shape, *context)
        check_divisible(self.image_shape, 2**HALVINGS, "conv_vae")
        channels, height, width = self.image_shape
        widths = [config.width << level for level in range(HALVINGS)]
        self.top = (widths[-1], height >> HALVINGS, width >> HALVINGS)
        num_features = prod(self.top)
        self.encoder = self._stack(nn.Conv2d, [channels, *widths])
        self.posterior = Posterior(num_features + self.condition_size, config.latent_size, config.flows)
        self.decoder_start = nn.Linear(config.latent_size + self.condition_size, num_features)
        self.decoder = self._stack(nn.ConvTranspose2d, widths[::-1])
        self.output = nn.ConvTranspose2d(widths[0], self.num_outputs, 4, stride=2, padding=1)

    def _stack(self, conv: type[nn.Module], widths: list[int]) -> nn.Sequential:
        """Convolutions from each width to the next, each followed by batch norm, if set, and the activation."""
        layers: list[nn.Module] = []
        batch_norm = self.config.batch_norm
        for before, after in pairwise(widths):
            layers.append(conv(before, after, 4, stride=2, padding=1, bias=not batch_norm))
            layers += [BatchNorm2d(after, momentum=TORCH_MOMENTUM)] if batch_norm else []
            layers.append(ACTIVATIONS[self.config.activation]())
        return nn.Sequential(*layers)

    def _encode(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return concatenated(self.encoder(x).flatten(1), condition)

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        start = self.decoder_start(concatenated(z, condition)).unflatten(1, self.top)  # (B, 4 width, H/8, W/8)
        return self.output(self.decoder(start))
