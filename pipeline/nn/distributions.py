"""Distributions over latents and pixels, all computed in float32 or better.

Pixels are given as x in [0, 1] and modelled as y = 2x - 1 in [-1, 1]. `log_prob` and `kl` are in nats. Sampling takes
its randomness as an argument: standard normal noise for `Normal`, uniforms in (0, 1) for the others.
"""

from functools import cached_property
from math import log, pi
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BinRule = Literal["published", "exact"]
Squashing = Literal["sigmoid", "tanh"]

SOFT_CLAMP = 5.0
MIN_SIGMA = 0.01
MIN_LOG_SCALE = -7.0
NARROW_BIN = log(1e-5)
"""Below this log-probability the published rule takes a bin's density at its centre times its width for its mass."""
WIDE_LOG_SCALE = 20.0
"""Above this log-scale a bin's mass is its density times its width to the last bit of float64."""


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32 if they were half precision; float32 and float64 stay."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def soft_clamp(values: Tensor) -> Tensor:
    """Smooth clamp to (-5, 5); the identity near 0."""
    return torch.tanh(values / SOFT_CLAMP) * SOFT_CLAMP


class Normal:
    """Diagonal normal, elementwise, from its mean and the logarithm of its sigma."""

    def __init__(self, mean: Tensor, log_sigma: Tensor):
        self.mean, self.log_sigma = at_least_float32(mean), at_least_float32(log_sigma)

    @classmethod
    def standard(cls, like: Tensor) -> "Normal":
        """Mean 0 and sigma 1, of this tensor's shape, device and precision."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    @cached_property
    def sigma(self) -> Tensor:
        return torch.exp(self.log_sigma)

    def sample(self, noise: Tensor) -> Tensor:
        """mu + sigma * noise, for standard normal noise of the same shape."""
        return torch.addcmul(self.mean, self.sigma, noise.to(self.mean.dtype))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density per element, nats."""
        return -0.5 * ((z - self.mean) / self.sigma).square() - (self.log_sigma + 0.5 * log(2 * pi))

    def kl(self, other: "Normal") -> Tensor:
        """KL(self || other) per element, nats."""
        distance = ((self.mean - other.mean) / other.sigma).square()
        ratio = (self.sigma / other.sigma).square()
        return 0.5 * (distance + ratio - 1) + (other.log_sigma - self.log_sigma)


class ClampedNormal(Normal):
    """Diagonal normal from raw, unbounded network outputs a and l, elementwise.

    mu = 5 tanh(a/5), sigma = temperature * (exp(5 tanh(l/5)) + 0.01): the bounds that keep NVAE stable (NVAE section
    3.2 and its reference release, which applies them to every normal, so that raw zeros mean sigma = 1.01).
    """

    def __init__(self, raw_mean: Tensor, raw_log_sigma: Tensor, temperature: float = 1.0):
        sigma = torch.exp(soft_clamp(at_least_float32(raw_log_sigma))) + MIN_SIGMA
        self.sigma = sigma if temperature == 1.0 else sigma * temperature
        self.mean = soft_clamp(at_least_float32(raw_mean))

    @cached_property
    def log_sigma(self) -> Tensor:
        return torch.log(self.sigma)


class PixelNormal:
    """Continuous density of y = 2x - 1 under a `Normal`; in bits not comparable with the discrete ones."""

    def __init__(self, normal: Normal):
        self.normal = normal

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of y per element (B, C, H, W), nats."""
        return self.normal.log_prob(2 * at_least_float32(x) - 1)

    @property
    def mean(self) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        return to_image(self.normal.mean)

    def sample(self, noise: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] from standard normal noise of that shape."""
        return to_image(self.normal.sample(noise))


class SquaredError:
    """The summed squared error of tutorials, from raw outputs (B, C, H, W): an unnormalised normal of variance 1/2.

    `sigmoid` compares x with sigmoid(raw) in [0, 1]; `tanh` compares y = 2x - 1 with tanh(raw) in [-1, 1]. Without its
    normaliser it is no density: values are comparable only with each other, not in bits with any likelihood.
    """

    def __init__(self, raw: Tensor, output: Squashing):
        self.raw, self.output = at_least_float32(raw), output

    def log_prob(self, x: Tensor) -> Tensor:
        """Minus the squared error per element (B, C, H, W)."""
        x = x.to(self.raw.dtype)
        error = x - torch.sigmoid(self.raw) if self.output == "sigmoid" else 2 * x - 1 - torch.tanh(self.raw)
        return -error.square()

    @property
    def mean(self) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        return torch.sigmoid(self.raw) if self.output == "sigmoid" else to_image(torch.tanh(self.raw))


class Bernoulli:
    """Independent binary pixels from logits (B, C, H, W)."""

    def __init__(self, logits: Tensor):
        self.logits = at_least_float32(logits)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability per element (B, C, H, W), nats; linear in x, so grey values in [0, 1] are also taken."""
        return -F.binary_cross_entropy_with_logits(self.logits, x.to(self.logits.dtype), reduction="none")

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits)

    def sample(self, uniform: Tensor) -> Tensor:
        """0 or 1 per element: 1 where the uniform is below the mean."""
        return (uniform < self.mean).to(self.logits.dtype)


class DiscretizedLogistic:
    """One logistic per channel, integrated over the 2^bits grey levels; the outermost bins reach to infinity.

    mean, log_scale: (B, C, H, W) for y in [-1, 1]. log_scale is clamped from below at -7.
    """

    def __init__(self, mean: Tensor, log_scale: Tensor, bits: int = 8):
        self.location = at_least_float32(mean)
        self.log_scale = at_least_float32(log_scale).clamp(min=MIN_LOG_SCALE)
        self.bits = bits

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of grey levels x (B, C, H, W) in [0, 1], per element, nats; sums to one over the levels."""
        y = 2 * x.to(self.location.dtype) - 1
        return discretized_logistic_log_prob(y, self.location, self.log_scale, self.bits, "exact")

    @property
    def mean(self) -> Tensor:
        return to_image(self.location)

    def sample(self, uniform: Tensor) -> Tensor:
        """Images in [0, 1], not rounded to levels, from uniforms of the image's shape."""
        return to_image(self.location + torch.exp(self.log_scale) * torch.logit(uniform.to(self.location.dtype)))


class DiscretizedLogisticMixture:
    """Mixture of K discretized logistics over RGB pixels, channels conditioned in the order R, G, B (PixelCNN++,
    section 2).

    params: (B, 10K, H, W) = K mixture logits, then for each of R, G, B: K means, K log-scales, K raw coefficients.
    bin_rule "published": as NVAE's published figures are computed. Every level y > 0.99 takes the whole upper tail,
    which at 8 bits counts the mass of 255 for level 254 as well, and improbable bins use the density. "exact": sums to
    one over the levels.
    """

    def __init__(self, params: Tensor, bits: int = 8, bin_rule: BinRule = "published"):
        params = at_least_float32(params)
        self.num_components = num_components = params.shape[1] // 10
        if params.shape[1] != 10 * num_components:
            raise ValueError(f"a mixture over RGB takes 10 channels per component, got {params.shape[1]} channels")
        self.bits, self.bin_rule = bits, bin_rule
        # channels go last: so they lie in memory in a channels_last network, and so the gradient is built
        self.mixture_logits, rest = params.permute(0, 2, 3, 1).split([num_components, 9 * num_components], dim=-1)
        per_channel = rest.unflatten(-1, (3, 3 * num_components))  # (B, H, W, 3, 3K)
        self.means, log_scales, coefficients = per_channel.split(num_components, dim=-1)  # each (B, H, W, 3, K)
        self.log_scales = log_scales.clamp(min=MIN_LOG_SCALE)
        self.coefficients = torch.tanh(coefficients)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability (B, H, W) of RGB pixels x (B, 3, H, W) in [0, 1], nats per pixel."""
        y = (2 * x.to(self.means.dtype) - 1).permute(0, 2, 3, 1).unsqueeze(-1)  # (B, H, W, 3, 1)
        channels = discretized_logistic_log_prob(y, self._means_given(y), self.log_scales, self.bits, self.bin_rule)
        return torch.logsumexp(channels.sum(-2) + torch.log_softmax(self.mixture_logits, dim=-1), dim=-1)

    def _means_given(self, y: Tensor) -> Tensor:
        """Component means (B, H, W, 3, K), each channel shifted by the true values of the channels before it."""
        red, green = y[..., 0, :], y[..., 1, :]
        c0, c1, c2 = self.coefficients.unbind(-2)
        shift = torch.stack([torch.zeros_like(c0), c0 * red, torch.addcmul(c1 * red, c2, green)], dim=-2)
        return self.means + shift

    @property
    def mean(self) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]: the mixture's average parameters through the chain R, G, B."""
        weights = torch.softmax(self.mixture_logits, dim=-1).unsqueeze(-2)  # (B, H, W, 1, K)
        return self._chain((self.means * weights).sum(-1), (self.coefficients * weights).sum(-1))

    def sample(self, uniform_mixture: Tensor, uniform_logistic: Tensor, temperature: float = 1.0) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], not rounded to levels, from uniforms (B, K, H, W) and (B, 3, H, W) in (0, 1).

        As in the reference release, a temperature below 1 sharpens the choice of component but *widens* the logistic
        noise.
        """
        gumbel = -torch.log(-torch.log(uniform_mixture.to(self.means.dtype).permute(0, 2, 3, 1)))  # (B, H, W, K)
        chosen = torch.argmax(self.mixture_logits / temperature + gumbel, dim=-1)[..., None, None]
        chosen = chosen.expand(-1, -1, -1, 3, -1)  # (B, H, W, 3, 1)
        mean, log_scale, coefficient = (
            values.gather(-1, chosen).squeeze(-1) for values in (self.means, self.log_scales, self.coefficients)
        )
        noise = torch.logit(uniform_logistic.to(mean.dtype).permute(0, 2, 3, 1))
        return self._chain(mean + torch.exp(log_scale) / temperature * noise, coefficient)

    @staticmethod
    def _chain(values: Tensor, coefficients: Tensor) -> Tensor:
        """Images (B, 3, H, W) from values and coefficients (B, H, W, 3): clamp R, then G given R, then B given both."""
        c0, c1, c2 = coefficients.unbind(-1)
        red = values[..., 0].clamp(-1, 1)
        green = (values[..., 1] + c0 * red).clamp(-1, 1)
        blue = (values[..., 2] + c1 * red + c2 * green).clamp(-1, 1)
        return to_image(torch.stack([red, green, blue], dim=1))


def to_image(y: Tensor) -> Tensor:
    """From [-1, 1], clamped, to [0, 1]."""
    return (y.clamp(-1, 1) + 1) / 2


def discretized_logistic_log_prob(y: Tensor, mean: Tensor, log_scale: Tensor, bits: int, rule: BinRule) -> Tensor:
    """Log of the logistic mass in the bin of each grey level y in [-1, 1], elementwise with broadcasting, nats.

    With a = (y + 1/N - mean) / scale and b = (y - 1/N - mean) / scale, N = 2^bits - 1, the mass sigmoid(a) -
    sigmoid(b) equals sigmoid(a) sigmoid(-b) (1 - exp(b - a)), whose logarithm needs no difference of nearly equal
    numbers.
    """
    num_steps = 2**bits - 1
    inverse_scale = torch.exp(-log_scale)
    centred = (y - mean) * inverse_scale
    half_width = inverse_scale / num_steps
    below_upper_edge = F.softplus(-centred - half_width)  # -log sigmoid(a)
    above_lower_edge = F.softplus(centred - half_width)  # -log sigmoid(-b)
    lowest, highest = _edge_levels(y, num_steps, rule)
    inside = _log_relative_width(log_scale, num_steps) - below_upper_edge - above_lower_edge
    if rule == "published":
        density = centred - log_scale - 2 * F.softplus(centred) - log(num_steps / 2)
        inside = torch.where(inside > NARROW_BIN, inside, density)
    return torch.where(lowest, -below_upper_edge, torch.where(highest, -above_lower_edge, inside))


def _edge_levels(y: Tensor, num_steps: int, rule: BinRule) -> tuple[Tensor, Tensor]:
    """Masks of the lowest and of the highest grey level."""
    if rule == "published":
        return y < -0.999, y > 0.99
    return y < -1 + 1 / num_steps, y > 1 - 1 / num_steps


def _log_relative_width(log_scale: Tensor, num_steps: int) -> Tensor:
    """log(1 - exp(-width / scale)) for bins of width 2/N, also where the width vanishes beside the scale."""
    bounded = log_scale.clamp(max=WIDE_LOG_SCALE)
    return torch.log(-torch.expm1(-2 / num_steps * torch.exp(-bounded))) - (log_scale - bounded)
