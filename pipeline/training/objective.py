"""The training objective: evidence lower bound with KL warm-up, KL balancing and free bits.

Sources: Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020, appendix A (warm-up, balancing);
Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016 (free bits); Hazami et al.,
"Efficient-VDVAE: Less is more", 2022 (weights by KL).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.models.base import LatentGroup, VAEOutput
from pipeline.schema import Section

Schedule = Literal["warmup", "constant", "cyclical", "low_to_high"]
Balancing = Literal["none", "equal", "linear", "sqrt", "square", "kl", "kl_per_element"]
BY_KL_ALONE = ("kl", "kl_per_element")


INACTIVE_KL = 0.01
"""Nats that NVAE's balancing adds to the KL of every group."""


class ObjectiveConfig(Section):
    """What is minimized."""

    beta: float = Field(1.0, ge=0)
    """Weight of the KL after the warm-up."""
    schedule: Schedule = "warmup"
    """How the KL weight reaches `beta`. warmup: linearly, by the settings kl_warmup_*; constant: from the start;
    cyclical: from 0 to `beta` in each of `num_cycles` cycles (Fu et al. 2019); low_to_high: linearly from `beta_low` to
    `beta` over the whole run."""
    num_cycles: int = Field(4, ge=1)
    """Cycles of `cyclical` over the run; in the first half of each the weight rises, then it stays at `beta`."""
    beta_low: float = Field(0.0, ge=0)
    """Initial weight of `low_to_high`."""
    kl_warmup_portion: float = Field(0.3, ge=0, le=1)
    """Share of the training steps over which the KL weight rises linearly to `beta`; 0: constant from the start."""
    kl_warmup_delay: float = Field(1e-4, ge=0, le=1)
    """Share of the training steps before that rise begins."""
    kl_warmup_floor: float = Field(1e-4, ge=0, le=1)
    """Smallest share of `beta`, used until the linear rise reaches it."""
    kl_balancing: Balancing = "square"
    """How strongly KL balancing favors the high-resolution groups during the warm-up; `none` switches it off. `kl` and
    `kl_per_element` are Efficient-VDVAE's: a group's weight is proportional to its KL, or to that of one element of its
    latent."""
    kl_balancing_portion: float | None = Field(None, ge=0, le=1)
    """Share of the training steps with KL balancing. Unset: during the warm-up of the KL weight."""
    free_bits: float = Field(0.0, ge=0)
    """Nats per latent group without a penalty: a group whose mean KL is at most this has no KL gradient. 0: off."""


class Objective:
    """Turns a model's output into the scalar to minimize, in nats per image.

    `mean_over_ranks` averages a tensor over the processes; for a single process it is the identity. KL balancing and
    free bits use averages over the whole batch, so the result does not depend on the number of processes.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        groups: Sequence[LatentGroup],
        total_steps: int,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        self.config = config
        self.groups = tuple(groups)
        self.total_steps = total_steps
        self.mean_over_ranks = mean_over_ranks
        self._alpha = torch.tensor(resolution_factors(groups, config.kl_balancing), dtype=torch.float64)

    def warmup(self, step: int) -> float:
        """Progress of the KL warm-up in [0, 1] at optimizer step `step`, counted from 0; 1 for the other schedules."""
        return kl_warmup(step, self.total_steps, self.config) if self.config.schedule == "warmup" else 1.0

    def beta(self, step: int) -> float:
        """Weight of the KL at optimizer step `step`."""
        config = self.config
        if config.schedule == "warmup":
            return config.beta * self.warmup(step)
        done = step / self.total_steps
        if config.schedule == "cyclical":
            return config.beta * min(2 * (done * config.num_cycles % 1), 1.0)
        if config.schedule == "low_to_high":
            return config.beta_low + (config.beta - config.beta_low) * min(step / max(self.total_steps - 1, 1), 1.0)
        return config.beta

    def balances(self, step: int) -> bool:
        """Whether optimizer step `step` has KL balancing."""
        portion = self.config.kl_balancing_portion
        within = self.warmup(step) < 1 if portion is None else step < portion * self.total_steps
        return self.config.kl_balancing != "none" and within

    def __call__(self, out: VAEOutput, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (a scalar with gradient) and statistics (detached scalars), as means over this process's images.

        Statistics: `elbo`, `log_px` and `kl` without weights, the model's own penalties, and per group `kl/NAME`.
        """
        return self._terms(out, *self._charges(out.kl, step))

    def charged_kl(self, kl: Tensor, step: int) -> Tensor:
        """The KL term of the loss, (B,) nats, after free bits, balancing and warm-up, from the KL per group (B, G)."""
        return self._charged(kl, *self._charges(kl, step))

    def compile(self, **options: Any) -> None:
        """Compiles what follows the collective. `options`: those of torch.compile."""
        self._terms = torch.compile(self._terms, **options)

    def _charges(self, kl: Tensor, step: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """beta (), whether each group is free of charge (G,), and its balancing weight (G,); None where not used.

        Tensors, because compiled code is compiled again for every new number.
        """
        beta, free_bits = kl.new_full((), self.beta(step)), self.config.free_bits
        balancing = self.balances(step)
        if not (balancing or free_bits):
            return beta, None, None
        constant = kl.detach()  # no gradient through weights and decisions
        means = torch.stack([constant.mean(dim=0), constant.abs().mean(dim=0)])  # (2, G)
        mean_kl, mean_abs_kl = self.mean_over_ranks(means)  # one collective for both
        self._alpha = self._alpha.to(kl)  # copies only the first time
        # False for NaN, which must reach the loss.
        free = mean_kl <= self.config.free_bits if self.config.free_bits else None
        floor = 0.0 if self.config.kl_balancing in BY_KL_ALONE else INACTIVE_KL
        return beta, free, balancing_weights(mean_abs_kl, self._alpha, floor) if balancing else None

    def _charged(self, kl: Tensor, beta: Tensor, free: Tensor | None, weights: Tensor | None) -> Tensor:
        if free is not None:
            kl = kl.masked_fill(free, self.config.free_bits)
        if weights is not None:
            kl = weights * kl
        return beta * kl.sum(dim=1)

    def _terms(
        self, out: VAEOutput, beta: Tensor, free: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        charged = self._charged(out.kl, beta, free, weights)
        return (charged - out.log_px + sum(out.penalties.values())).mean(), self._statistics(out)

    @torch.no_grad()
    def _statistics(self, out: VAEOutput) -> dict[str, Tensor]:
        kl, log_px = out.kl.mean(dim=0), out.log_px.mean()  # (G,), ()
        total = kl.sum()
        statistics = {"elbo": log_px - total, "log_px": log_px, "kl": total}
        for group, group_kl in zip(self.groups, kl, strict=True):
            statistics[f"kl/{group.name}"] = group_kl
        return statistics | {name: penalty.mean() for name, penalty in out.penalties.items()}


def kl_warmup(step: int, total_steps: int, config: ObjectiveConfig) -> float:
    """Linear rise of the KL weight from `kl_warmup_floor` to 1, as a pure function of the optimizer step."""
    if config.kl_warmup_portion == 0:
        return 1.0
    risen = (step - config.kl_warmup_delay * total_steps) / (config.kl_warmup_portion * total_steps)
    return max(min(risen, 1.0), config.kl_warmup_floor)


def resolution_factors(groups: Sequence[LatentGroup], rule: Balancing) -> list[float]:
    """The alpha of KL balancing for each group: larger means a lighter KL weight. The smallest is 1.

    Groups of one resolution form a scale; scales are counted from 0 in the order of sampling (lowest resolution first).
    """
    group_count = Counter(group.shape[1:] for group in groups)
    scale = {resolution: i for i, resolution in enumerate(group_count)}
    formulas = {
        "none": lambda i, n: 1.0,
        "equal": lambda i, n: 1.0,
        "linear": lambda i, n: 2.0**i,
        "sqrt": lambda i, n: 2.0 ** (i / 2),
        "square": lambda i, n: 4.0**i / n,
        "kl": lambda i, n: 1.0,
    }
    raw = [float(prod(group.shape)) for group in groups]
    if rule != "kl_per_element":
        raw = [formulas[rule](scale[group.shape[1:]], group_count[group.shape[1:]]) for group in groups]
    return [value / min(raw) for value in raw]


def balancing_weights(mean_abs_kl: Tensor, alpha: Tensor, floor: float = INACTIVE_KL) -> Tensor:
    """KL weight per group, (G,) with mean 1. A small KL gets a small weight, so that no group is pruned early.

    `mean_abs_kl` (G,) is the batch mean of |KL| in nats; `floor` nats are added so that an inactive group keeps a
    weight.
    """
    weights = (mean_abs_kl + floor) / alpha
    return weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)
