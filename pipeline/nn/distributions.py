"""Distributions of latents and pixels, all computed in float32 or better.

Pixels are passed as x in [0, 1] and modeled as y = 2x - 1 in [-1, 1]. `log_prob` and `kl` are in nats. `sample` takes
its random numbers as an argument: standard normal noise for `Normal`, uniforms in (0, 1) for the others.
"""

from dataclasses import dataclass
from math import log, pi
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BinRule = Literal["published", "exact", "vdvae", "vdvae_overlapping_5_bit", "efficient_vdvae_overlapping_5_bit"]
OVERLAPPING = ("vdvae_overlapping_5_bit", "efficient_vdvae_overlapping_5_bit")
"""Bin rules that make 5 bits of 8."""
ScaleRule = Literal["exp", "softplus"]
Squashing = Literal["sigmoid", "tanh"]

SOFT_CLAMP = 5.0
MIN_SIGMA = 0.01
MIN_LOG_SCALE = -7.0
NARROW_BIN = log(1e-5)
"""Below this log-probability, all rules but "exact" approximate a bin's mass by its width times the density at its
center."""
HIGHEST_OF_5_BITS = 248 / 127.5 - 1
"""The highest value of the rules that make 5 bits of 8."""
UPPER_EDGES = {
    "published": 0.99,
    "vdvae": 0.999,
    "vdvae_overlapping_5_bit": 0.999,
    "efficient_vdvae_overlapping_5_bit": HIGHEST_OF_5_BITS - 1e-3,
}
"""By bin rule: levels y above get the whole upper tail."""
ALMOST_LINEAR = 40.0
"""Above this, beta raw equals log(1 + exp(beta raw)) in float64."""
WIDE_LOG_SCALE = 20.0
"""Above this log-scale, a bin's mass equals its width times its density in float64."""


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision values as float32; float32 and float64 unchanged."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def soft_clamp(values: Tensor) -> Tensor:
    """Smooth clamp to (-5, 5), close to the identity near 0."""
    return torch.tanh(values / SOFT_CLAMP) * SOFT_CLAMP


def softplus(raw: Tensor, beta: float) -> Tensor:
    """log(1 + exp(beta raw)) / beta."""
    return F.softplus(raw, beta, ALMOST_LINEAR)


class Normal:
    """Diagonal normal, elementwise, from its mean and the logarithm of its sigma."""

    def __init__(self, mean: Tensor, log_sigma: Tensor):
        self.mean, self.log_sigma = at_least_float32(mean), at_least_float32(log_sigma)
        self.sigma = torch.exp(self.log_sigma)

    @classmethod
    def standard(cls, like: Tensor) -> "Normal":
        """Mean 0 and sigma 1, with this tensor's shape, device and dtype."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

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


class NormalOfSigma(Normal):
    """Diagonal normal, elementwise, from its mean and sigma. log sigma is computed at each use: samples need none."""

    def __init__(self, mean: Tensor, sigma: Tensor):
        self.mean, self.sigma = mean, sigma

    @property
    def log_sigma(self) -> Tensor:
        return torch.log(self.sigma)


class ClampedNormal(NormalOfSigma):
    """Diagonal normal, elementwise, from unbounded network outputs a and l.

    mu = 5 tanh(a/5), sigma = temperature * (exp(5 tanh(l/5)) + 0.01). The bounds make training stable (NVAE section
    3.2). The reference release applies them to every normal, so a = l = 0 gives sigma = 1.01.
    """

    def __init__(self, raw_mean: Tensor, raw_log_sigma: Tensor, temperature: float = 1.0):
        mean, log_sigma = soft_clamp(at_least_float32(raw_mean)), soft_clamp(at_least_float32(raw_log_sigma))
        super().__init__(mean, _sigma(log_sigma, temperature))


class JointClampedNormal(NormalOfSigma):
    """`ClampedNormal` from outputs (..., 2C, H, W), all raw means and then all raw log sigmas, clamped at once."""

    def __init__(self, raw: Tensor, temperature: float = 1.0):
        mean, log_sigma = soft_clamp(at_least_float32(raw)).chunk(2, dim=-3)
        super().__init__(mean, _sigma(log_sigma, temperature))


def _sigma(log_sigma: Tensor, temperature: float) -> Tensor:
    sigma = torch.exp(log_sigma) + MIN_SIGMA
    return sigma if temperature == 1.0 else sigma * temperature


class PixelNormal:
    """Density of y = 2x - 1 under a `Normal`. Not comparable with the probabilities of discrete distributions."""

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
    """The summed squared error of many tutorials, from raw outputs (B, C, H, W).

    `sigmoid`: error of sigmoid(raw) against x in [0, 1]. `tanh`: of tanh(raw) against y = 2x - 1 in [-1, 1]. This is
    a normal of variance 1/2 without its normalizing constant: not a density, and not comparable with one.
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
        """Log-probability per element (B, C, H, W), nats. Linear in x, so gray values in [0, 1] are allowed."""
        return -F.binary_cross_entropy_with_logits(self.logits, x.to(self.logits.dtype), reduction="none")

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits)

    def sample(self, uniform: Tensor) -> Tensor:
        """0 or 1 per element: 1 if the uniform is below the mean."""
        return (uniform < self.mean).to(self.logits.dtype)


class DiscretizedLogistic:
    """One logistic per channel, integrated over bins around the 2^bits gray levels. The outermost bins are unbounded.

    mean, log_scale: (B, C, H, W) for y in [-1, 1]. log_scale is clamped to at least -7.
    """

    def __init__(self, mean: Tensor, log_scale: Tensor, bits: int = 8):
        self.location = at_least_float32(mean)
        self.log_scale = at_least_float32(log_scale).clamp(min=MIN_LOG_SCALE)
        self.bits = bits

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability per element of gray levels x (B, C, H, W) in [0, 1], nats. Normalized over the levels."""
        y = 2 * x.to(self.location.dtype) - 1
        return discretized_logistic_log_prob(y, self.location, self.log_scale, self.bits, "exact")

    @property
    def mean(self) -> Tensor:
        return to_image(self.location)

    def sample(self, uniform: Tensor) -> Tensor:
        """Images in [0, 1], not rounded to levels, from uniforms of the image's shape."""
        return to_image(self.location + torch.exp(self.log_scale) * torch.logit(uniform.to(self.location.dtype)))


@dataclass(frozen=True)
class LogisticScale:
    """The scales of logistics from raw outputs: exp(beta max(raw, minimum)), or softplus with beta, but at least
    exp(minimum).
    """

    rule: ScaleRule = "exp"
    beta: float = 1.0
    minimum: float = MIN_LOG_SCALE

    def log_scale(self, raw: Tensor) -> Tensor:
        """Logarithms of the scales."""
        if self.rule == "softplus":
            # A softplus that underflows to 0 would have a gradient that is not a number.
            scale = softplus(raw, self.beta).clamp(min=torch.finfo(raw.dtype).tiny)
            return torch.log(scale).clamp(min=self.minimum)
        clamped = raw.clamp(min=self.minimum)
        return clamped if self.beta == 1 else self.beta * clamped


class DiscretizedLogisticMixture:
    """Mixture of K discretized logistics over RGB pixels, channels conditioned in the order R, G, B (PixelCNN++,
    section 2).

    params: (B, 10K, H, W) = K mixture logits, then for each of R, G, B: K means, K log-scales, K raw coefficients.
    bin_rule "published": the rule behind NVAE's published figures. Every level y > 0.99 gets the whole upper tail; at 8
    bits, level 254 therefore also gets the mass of level 255. Improbable bins use the density. "exact": normalized over
    the levels. "vdvae": the rule behind VDVAE's published figures. As "published", but the upper tail belongs to the
    highest level alone. "vdvae_overlapping_5_bit": its rule for 5 bits, of 8-bit images. The 32 levels 0, 8, ..., 248
    are 16/255 apart and get bins of width 2/31, which overlap; nothing gets the upper tail. Their probabilities add up
    to as much as 1.45, so it is for comparison with published figures only. "efficient_vdvae_overlapping_5_bit": that
    of Efficient-VDVAE, in which level 248 gets the upper tail and is the largest sample.
    `scale`: how the scales of the logistics follow from the params.
    """

    def __init__(
        self, params: Tensor, bits: int = 8, bin_rule: BinRule = "published", scale: "LogisticScale | None" = None
    ):
        params = at_least_float32(params)
        self.num_components = num_components = params.shape[1] // 10
        if params.shape[1] != 10 * num_components:
            raise ValueError(f"a mixture over RGB takes 10 channels per component, got {params.shape[1]} channels")
        self.bits, self.bin_rule = 5 if bin_rule in OVERLAPPING else bits, bin_rule
        self.highest = HIGHEST_OF_5_BITS if bin_rule == "efficient_vdvae_overlapping_5_bit" else 1.0
        # channels last, as in the memory of a channels_last network
        self.mixture_logits, rest = params.permute(0, 2, 3, 1).split([num_components, 9 * num_components], dim=-1)
        per_channel = rest.unflatten(-1, (3, 3 * num_components))  # (B, H, W, 3, 3K)
        self.means, log_scales, coefficients = per_channel.split(num_components, dim=-1)  # each (B, H, W, 3, K)
        self.log_scales = (scale or LogisticScale()).log_scale(log_scales)
        self.coefficients = torch.tanh(coefficients)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability (B, H, W) of RGB pixels x (B, 3, H, W) in [0, 1], nats per pixel."""
        return self.log_prob_of_values(pixel_values(x.to(self.means.dtype), self.bin_rule))

    def log_prob_of_values(self, y: Tensor) -> Tensor:
        """Log-probability (B, H, W) of the bins around values y (B, 3, H, W) in [-1, 1], nats per pixel."""
        y = y.permute(0, 2, 3, 1).unsqueeze(-1)  # (B, H, W, 3, 1)
        channels = discretized_logistic_log_prob(y, self._means_given(y), self.log_scales, self.bits, self.bin_rule)
        return torch.logsumexp(channels.sum(-2) + torch.log_softmax(self.mixture_logits, dim=-1), dim=-1)

    def _means_given(self, y: Tensor) -> Tensor:
        """Component means (B, H, W, 3, K), each channel shifted by the values y of the channels before it."""
        red, green = y[..., 0, :], y[..., 1, :]
        c0, c1, c2 = self.coefficients.unbind(-2)
        shift = torch.stack([torch.zeros_like(c0), c0 * red, torch.addcmul(c1 * red, c2, green)], dim=-2)
        return self.means + shift

    @property
    def mean(self) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]: the average parameters of the mixture, applied in the order R, G, B."""
        weights = torch.softmax(self.mixture_logits, dim=-1).unsqueeze(-2)  # (B, H, W, 1, K)
        return self._chain((self.means * weights).sum(-1), (self.coefficients * weights).sum(-1))

    def sample(self, uniform_mixture: Tensor, uniform_logistic: Tensor, temperature: float = 1.0) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], not rounded to levels, from uniforms (B, K, H, W) and (B, 3, H, W) in (0, 1).

        As in the reference release, a temperature below 1 makes the choice of the component more certain, but divides
        (increases) the logistic noise.
        """
        gumbel = -torch.log(-torch.log(uniform_mixture.to(self.means.dtype).permute(0, 2, 3, 1)))  # (B, H, W, K)
        chosen = torch.argmax(self.mixture_logits / temperature + gumbel, dim=-1)[..., None, None]
        chosen = chosen.expand(-1, -1, -1, 3, -1)  # (B, H, W, 3, 1)
        mean, log_scale, coefficient = (
            values.gather(-1, chosen).squeeze(-1) for values in (self.means, self.log_scales, self.coefficients)
        )
        noise = torch.logit(uniform_logistic.to(mean.dtype).permute(0, 2, 3, 1))
        return self._chain(mean + torch.exp(log_scale) / temperature * noise, coefficient)

    def _chain(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Images (B, 3, H, W) from values and coefficients (B, H, W, 3): clamp R, then G given R, then B given both."""
        c0, c1, c2 = coefficients.unbind(-1)
        red = values[..., 0].clamp(-1, self.highest)
        green = (values[..., 1] + c0 * red).clamp(-1, self.highest)
        blue = (values[..., 2] + c1 * red + c2 * green).clamp(-1, self.highest)
        return to_image(torch.stack([red, green, blue], dim=1))


def pixel_values(x: Tensor, bin_rule: BinRule) -> Tensor:
    """The values y in [-1, 1] of pixels x in [0, 1], reduced to 5 bits for the rules that do so."""
    if bin_rule in OVERLAPPING:
        x = torch.floor(torch.round(255 * x) / 8) * (8 / 255)
    return 2 * x - 1


def to_image(y: Tensor) -> Tensor:
    """y, clamped to [-1, 1], rescaled to [0, 1]."""
    return (y.clamp(-1, 1) + 1) / 2


def discretized_logistic_log_prob(y: Tensor, mean: Tensor, log_scale: Tensor, bits: int, rule: BinRule) -> Tensor:
    """Log of the logistic mass in the bin of each gray level y in [-1, 1], elementwise with broadcasting, nats.

    With a = (y + 1/N - mean) / scale and b = (y - 1/N - mean) / scale, N = 2^bits - 1, the mass sigmoid(a) -
    sigmoid(b) equals sigmoid(a) sigmoid(-b) (1 - exp(b - a)). The logarithm of this product has no difference of nearly
    equal numbers.
    """
    num_steps = 2**bits - 1
    inverse_scale = torch.exp(-log_scale)
    centered = (y - mean) * inverse_scale
    half_width = inverse_scale / num_steps
    below_upper_edge = F.softplus(-centered - half_width)  # -log sigmoid(a)
    above_lower_edge = F.softplus(centered - half_width)  # -log sigmoid(-b)
    lowest, highest = _edge_levels(y, num_steps, rule)
    inside = _log_relative_width(log_scale, num_steps) - below_upper_edge - above_lower_edge
    if rule != "exact":
        density = centered - log_scale - 2 * F.softplus(centered) - log(num_steps / 2)
        inside = torch.where(inside > NARROW_BIN, inside, density)
    return torch.where(lowest, -below_upper_edge, torch.where(highest, -above_lower_edge, inside))


def _edge_levels(y: Tensor, num_steps: int, rule: BinRule) -> tuple[Tensor, Tensor]:
    """Masks of the lowest and of the highest gray level."""
    if rule == "exact":
        return y < -1 + 1 / num_steps, y > 1 - 1 / num_steps
    return y < -0.999, y > UPPER_EDGES[rule]


def _log_relative_width(log_scale: Tensor, num_steps: int) -> Tensor:
    """log(1 - exp(-width / scale)) for bins of width 2/N, also if the width is tiny compared with the scale."""
    bounded = log_scale.clamp(max=WIDE_LOG_SCALE)
    return torch.log(-torch.expm1(-2 / num_steps * torch.exp(-bounded))) - (log_scale - bounded)
