"""Normal distributions of latents from the raw outputs of a network, (..., 2C, H, W): means, then raw scales."""

from dataclasses import dataclass

from torch import Tensor

from pipeline.nn.distributions import Normal, NormalOfSigma, ScaleRule, at_least_float32, softplus


@dataclass(frozen=True)
class LatentNormals:
    """How prior and posterior follow from raw outputs. Nothing bounds means and scales.

    `scale`: sigma is exp(beta raw), or softplus with beta. A beta below 1 makes gradients smoother (Hazami et al. 2022,
    arXiv:2203.13751). `residual`: the posterior's outputs are relative to the prior's. Means are added, and sigmas are
    multiplied.
    """

    scale: ScaleRule = "exp"
    beta: float = 1.0
    residual: bool = False

    def prior(self, raw: Tensor) -> Normal:
        return self._normal(*at_least_float32(raw).chunk(2, dim=-3))

    def posterior(self, raw: Tensor, raw_prior: Tensor) -> Normal:
        mean, scale = at_least_float32(raw).chunk(2, dim=-3)
        if not self.residual:
            return self._normal(mean, scale)
        prior_mean, prior_scale = at_least_float32(raw_prior).chunk(2, dim=-3)
        if self.scale == "exp":
            return self._normal(prior_mean + mean, prior_scale + scale)
        sigma = softplus(prior_scale, self.beta) * softplus(scale, self.beta)
        return NormalOfSigma(prior_mean + mean, sigma)

    def _normal(self, mean: Tensor, scale: Tensor) -> Normal:
        if self.scale == "softplus":
            return NormalOfSigma(mean, softplus(scale, self.beta))
        return Normal(mean, scale if self.beta == 1 else self.beta * scale)
