"""Normalizing flows on the samples of a posterior with one latent vector, conditioned on the encoder's features.

Every step maps z (B, L) and features (B, F) to (z', log_det), both (B, L). The sum of log_det over the units is
log |det dz'/dz|. With a triangular Jacobian each unit has its own term; otherwise the sum is divided equally.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.nn.distributions import at_least_float32
from pipeline.schema import Count, Layers, Section

SMALLEST_SQUARE = 1e-12
INITIAL_GATE_LOGIT = 2.0


class PlanarFlows(Section):
    """Planar flows (Rezende & Mohamed 2015)."""

    name: Literal["planar"] = "planar"
    length: Layers = 4
    """Number of flow steps."""

    def build(self, latent_size: int, num_features: int) -> nn.ModuleList:
        """The steps, in order."""
        return nn.ModuleList(PlanarFlow(latent_size, num_features) for _ in range(self.length))


class AutoregressiveFlows(Section):
    """Inverse autoregressive flows (Kingma et al. 2016)."""

    name: Literal["iaf"] = "iaf"
    length: Layers = 2
    """Number of flow steps. The order of the units is reversed from one to the next."""
    hidden: Count = 128
    """Units of the hidden layer of each step."""

    def build(self, latent_size: int, num_features: int) -> nn.ModuleList:
        """The steps, in order."""
        steps = range(self.length)
        return nn.ModuleList(InverseFlow(latent_size, num_features, self.hidden, step % 2 == 1) for step in steps)


Flows = Annotated[PlanarFlows | AutoregressiveFlows, Field(discriminator="name")]


class PlanarFlow(nn.Module):
    """z' = z + u tanh(w z + b) (Rezende & Mohamed 2015, eq. 10 to 12).

    u, w, b are computed from the features. u is moved along w so that u w > -1, which makes the map invertible
    (appendix A.1).
    """

    def __init__(self, latent_size: int, num_features: int):
        super().__init__()
        self.to_parameters = nn.Linear(num_features, 2 * latent_size + 1)
        self.sizes = [latent_size, latent_size, 1]

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b = at_least_float32(self.to_parameters(features)).split(self.sizes, dim=1)  # (B, L), (B, L), (B, 1)
        u, margin = invertible(u, w)
        hidden = torch.tanh((w * z).sum(1, keepdim=True) + b)  # (B, 1)
        determinant = hidden.square() + (1 - hidden.square()) * margin  # 1 + (1 - hidden^2) u w; both terms positive
        log_det = torch.log(determinant.clamp(min=torch.finfo(z.dtype).tiny))
        return z + u * hidden, (log_det / z.shape[1]).expand_as(z)


def invertible(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """u (B, L) moved along w so that u w > -1, and the margin u w + 1 (B, 1)."""
    product = (w * u).sum(1, keepdim=True)
    margin = F.softplus(product)
    square = w.square().sum(1, keepdim=True)
    bounded = square.clamp(min=SMALLEST_SQUARE)
    moved = u + (margin - 1 - product) * w / bounded
    return moved, torch.lerp(product + 1, margin, square / bounded)


class MaskedLinear(nn.Linear):
    """Linear layer whose weights are multiplied by a 0/1 `mask` (out, in)."""

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class InverseFlow(nn.Module):
    """z'_i = s_i z_i + (1 - s_i) m_i. Gate s_i in (0, 1) and mean m_i depend on the features and the units before i.

    The numerically stable form of Kingma et al. 2016 (eq. 13 and 14, appendix C). The network is a MADE with one hidden
    layer (Germain et al. 2015). `reverse`: the order of the units is reversed. Gates are initialized to sigmoid(2).
    """

    def __init__(self, latent_size: int, num_features: int, hidden: int, reverse: bool):
        super().__init__()
        into, out = autoregressive_masks(latent_size, hidden, reverse)
        self.latent_layer = MaskedLinear(into)
        self.feature_layer = nn.Linear(num_features, hidden, bias=False)
        self.mean = MaskedLinear(out)
        self.gate = MaskedLinear(out)
        nn.init.constant_(self.gate.bias, INITIAL_GATE_LOGIT)

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.elu(self.latent_layer(z) + self.feature_layer(features))  # (B, hidden)
        mean, raw_gate = at_least_float32(self.mean(hidden)), at_least_float32(self.gate(hidden))
        return torch.lerp(mean, z, torch.sigmoid(raw_gate)), F.logsigmoid(raw_gate)


def autoregressive_masks(latent_size: int, hidden: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """0/1 masks (hidden, L) and (L, hidden) of the layers before and after a hidden layer.

    Output i depends on the inputs before i. A hidden unit of degree d depends on the first d inputs; with degree 0, on
    the features only, as the first output must.
    """
    order = torch.arange(latent_size)
    order = order.flip(0) if reverse else order
    degrees = torch.arange(hidden) % latent_size
    return (order < degrees[:, None]).float(), (degrees <= order[:, None]).float()
