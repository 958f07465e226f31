"""A VAE of fully connected layers, as in most tutorials (Kingma & Welling 2014, arXiv:1312.6114, appendix C).

With a condition it is a conditional VAE (Sohn et al. 2015, "Learning Structured Output Representation using Deep
Conditional Generative Models"): the condition is concatenated to the encoder's input and to the latent.

    h = relu(W1 [x, c]);  mu, log sigma^2 = linear layers of h;  x^ = W3 relu(W2 [z, c])
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.conditions import Condition
from pipeline.models.vector_vae import VectorVAE, VectorVAEConfig, concatenated
from pipeline.nn.posterior import Posterior
from pipeline.schema import Count


class MLPVAEConfig(VectorVAEConfig):
    """Architecture of an MLP VAE. The defaults are the tutorials' 784-400-(20, 20), 20-400-784."""

    name: Literal["mlp_vae"] = "mlp_vae"
    hidden: Count = 400
    """Width of the hidden layer of encoder and decoder."""

    def build(
        self, image_shape: tuple[int, int, int], border: int, bits: int, condition: Condition | None = None
    ) -> "MLPVAE":
        """The model for padded images of this shape."""
        return MLPVAE(self, image_shape, border, bits, condition.size if condition else 0)


class MLPVAE(VectorVAE):
    """The model described at the top of this file. Takes images of any shape; pixels in the order (C, H, W)."""

    config: MLPVAEConfig

    def __init__(self, config: MLPVAEConfig, image_shape: tuple[int, int, int], *context):
        super().__init__(config, image_shape, *context)
        channels, height, width = self.image_shape
        self.encoder = nn.Linear(channels * height * width + self.condition_size, config.hidden)
        self.posterior = Posterior(config.hidden, config.latent_size, config.flows)
        self.decoder = nn.Linear(config.latent_size + self.condition_size, config.hidden)
        self.output = nn.Linear(config.hidden, self.num_outputs * height * width)

    def _encode(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return F.relu(self.encoder(concatenated(x.flatten(1), condition)))

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        outputs = self.output(F.relu(self.decoder(concatenated(z, condition))))
        return outputs.unflatten(1, (self.num_outputs, *self.image_shape[1:]))
