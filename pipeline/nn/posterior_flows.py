"""Normalising flows on a flat posterior's draws, their parameters given by the encoder (amortised).

Every step maps (z, features), (B, L) and (B, F), to (z', log_det), both (B, L). log_det summed over the units is
log |det dz'/dz|, exactly: one unit's own share where the Jacobian is triangular, else equal shares.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.nn.distributions import at_least_float32
from pipeline.schema import Count, Layers, Section

SMALLEST_SQUARE = 1e-12
OPEN_GATE = 2.0


class PlanarFlows(Section):
    """Planar flows (Rezende & Mohamed 2015)."""

    name: Literal["planar"] = "planar"
    length: Layers = 4
    """Steps."""

    def build(self, latent_size: int, num_features: int) -> nn.ModuleList:
        """The steps, in order."""
        return nn.ModuleList(PlanarFlow(latent_size, num_features) for _ in range(self.length))


class AutoregressiveFlows(Section):
    """Inverse autoregressive flows (Kingma et al. 2016)."""

    name: Literal["iaf"] = "iaf"
    length: Layers = 2
    """Steps; the order of the units is reversed from one to the next."""
    hidden: Count = 128
    """Units of each step's hidden layer."""

    def build(self, latent_size: int, num_features: int) -> nn.ModuleList:
        """The steps, in order."""
        steps = range(self.length)
        return nn.ModuleList(InverseFlow(latent_size, num_features, self.hidden, step % 2 == 1) for step in steps)


Flows = Annotated[PlanarFlows | AutoregressiveFlows, Field(discriminator="name")]


class PlanarFlow(nn.Module):
    """z' = z + u tanh(w z + b) with u, w, b from the features (Rezende & Mohamed 2015, eq. 10 to 12).

    u is moved along w so that u w > -1, which makes the map invertible (their appendix A.1).
    """

    def __init__(self, latent_size: int, num_features: int):
        super().__init__()
        self.to_parameters = nn.Linear(num_features, 2 * latent_size + 1)
        self.sizes = [latent_size, latent_size, 1]

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b = at_least_float32(self.to_parameters(features)).split(self.sizes, dim=1)  # (B, L), (B, L), (B, 1)
        u, room = invertible(u, w)
        hidden = torch.tanh((w * z).sum(1, keepdim=True) + b)  # (B, 1)
        determinant = hidden.square() + (1 - hidden.square()) * room  # 1 + (1 - hidden^2) u w: a sum of positive terms
        log_det = torch.log(determinant.clamp(min=torch.finfo(z.dtype).tiny))
        return z + u * hidden, (log_det / z.shape[1]).expand_as(z)


def invertible(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """u (B, L) moved along w so that their product is above -1, and by how much it is (B, 1)."""
    product = (w * u).sum(1, keepdim=True)
    room = F.softplus(product)
    square = w.square().sum(1, keepdim=True)
    bounded = square.clamp(min=SMALLEST_SQUARE)
    moved = u + (room - 1 - product) * w / bounded
    return moved, torch.lerp(product + 1, room, square / bounded)


class MaskedLinear(nn.Linear):
    """Linear layer of which only the weights where `mask` (out, in) is 1 take part."""

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class InverseFlow(nn.Module):
    """z'_i = s_i z_i + (1 - s_i) m_i, where gate s_i in (0, 1) and mean m_i see the features and the units before i.

    The numerically stable form of Kingma et al. 2016 (eq. 13 and 14, appendix C), its network a MADE of one hidden
    layer (Germain et al. 2015). `reverse`: "before" means of a higher number. Gates begin nearly open.
    """

    def __init__(self, latent_size: int, num_features: int, hidden: int, reverse: bool):
        super().__init__()
        into, out = autoregressive_masks(latent_size, hidden, reverse)
        self.latent_layer = MaskedLinear(into)
        self.feature_layer = nn.Linear(num_features, hidden, bias=False)
        self.mean = MaskedLinear(out)
        self.gate = MaskedLinear(out)
        nn.init.constant_(self.gate.bias, OPEN_GATE)

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.elu(self.latent_layer(z) + self.feature_layer(features))  # (B, hidden)
        mean, raw_gate = at_least_float32(self.mean(hidden)), at_least_float32(self.gate(hidden))
        return torch.lerp(mean, z, torch.sigmoid(raw_gate)), F.logsigmoid(raw_gate)


def autoregressive_masks(latent_size: int, hidden: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """0/1 masks (hidden, L) into and (L, hidden) out of a hidden layer, so that output i sees the inputs before i.

    A hidden unit of degree d sees the d first inputs: with 0, the features alone, which the first output needs.
    """
    order = torch.arange(latent_size)
    order = order.flip(0) if reverse else order
    degrees = torch.arange(hidden) % latent_size
    return (order < degrees[:, None]).float(), (degrees <= order[:, None]).float()
