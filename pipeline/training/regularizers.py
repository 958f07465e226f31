"""Penalties on the network itself: spectral norms of convolutions and scales of batch norm.

Source: Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020, section 3.2 (spectral
regularization, and the penalty on batch norm's scale). Both bound activations, and so the KL of a deep hierarchy.
"""

import math
from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipeline.models.noise import sample_seed
from pipeline.nn.distributions import at_least_float32
from pipeline.nn.layers import find_convs
from pipeline.nn.weight_cache import WeightCache
from pipeline.schema import Section
from pipeline.training.spectral import SMALLEST_NORM, sum_of_singular_values


class RegularizerConfig(Section):
    """Penalties that keep the network smooth."""

    strength: float = Field(1e-2, ge=0)
    """Coefficient of the spectral and batch-norm penalties; 0: off."""
    initial_strength: float | None = Field(None, gt=0)
    """Coefficient at the start, which changes to `strength` geometrically during the KL warm-up. Unset: constant."""
    power_iterations: int = Field(4, ge=1)
    """Power iterations per training step, starting from the last step's vectors."""
    first_power_iterations: int = Field(40, ge=1)
    """Power iterations of the first step, which starts from random vectors."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.initial_strength and not self.strength:
            raise ValueError(
                f"regularizers.initial_strength={self.initial_strength:g} is set, but regularizers.strength is 0; "
                "unset the first (null) or raise the second"
            )
        return self


class Regularizers:
    """The penalty that a training step adds to its loss, and the singular vectors that are kept from step to step.

    A call does not change the kept vectors: `commit` keeps those of the last call, `discard` drops them. So a skipped
    step changes nothing, and a repeated call returns the same penalty. All processes compute the same.
    """

    def __init__(self, config: RegularizerConfig, model: nn.Module, seed: int):
        self.config = config
        self._seed = seed
        self._convs: dict[str, list[nn.Conv2d]] = {}  # by matrix shape "RxC", in registration order
        for conv in find_convs(model).values():
            self._convs.setdefault(_matrix_shape(conv), []).append(conv)
        self._weights: WeightCache = getattr(model, "weight_cache", None) or WeightCache(model)
        self._weights.shared = bool(config.strength)
        self._reference = next(model.parameters())
        # Left singular vectors (n, R) by matrix shape "RxC"; empty until the first commit. The right ones follow.
        self._vectors: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def __call__(self, warmup: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalty (a scalar with gradient) and statistics (detached scalars), for a KL warm-up in [0, 1].

        Call it once per optimizer step, outside the forward pass.
        """
        if not self.config.strength:
            return self._reference.new_zeros(()), {}
        spectral, batch_norm = self.spectral(), self.batch_norm()
        penalty = self.strength(warmup) * (spectral + batch_norm)
        return penalty, {"spectral": spectral.detach(), "batch_norm": batch_norm.detach()}

    def strength(self, warmup: float) -> float:
        """The coefficient: from `initial_strength` to `strength`, geometrically, as the warm-up goes from 0 to 1."""
        if self.config.initial_strength is None:
            return self.config.strength
        return math.exp((1 - warmup) * math.log(self.config.initial_strength) + warmup * math.log(self.config.strength))

    def spectral(self) -> Tensor:
        """Sum over convolutions of the largest singular value of the effective weight, as a matrix (C_out, rest).

        The value is a lower bound by power iteration; its gradient treats the singular vectors as constants.
        """
        iterations = self.config.power_iterations if self._vectors else self.config.first_power_iterations
        # bfloat16 is too imprecise for a power iteration.
        with torch.autocast(self._reference.device.type, enabled=False):
            matrices = self._matrices()
            if not matrices:
                return self._reference.new_zeros(())
            starts = self._vectors or {name: self._first_vectors(name, stack) for name, stack in matrices.items()}
            total, u = sum_of_singular_values(list(matrices.values()), [starts[name] for name in matrices], iterations)
        self._pending = dict(zip(matrices, u, strict=True))
        return total

    def batch_norm(self) -> Tensor:
        """Sum over batch-norm layers of the largest |scale|. Channels that tie for it share its gradient equally."""
        # amax divides the gradient among ties; max along a dimension would give it all to one channel.
        largest = [scales.abs().amax(dim=1) for _, scales in self._weights.scales()]
        return torch.cat(largest).sum() if largest else self._reference.new_zeros(())

    def commit(self) -> None:
        """Keeps the singular vectors of the last call for the next step."""
        self._vectors, self._pending = self._pending or self._vectors, {}

    def discard(self) -> None:
        """Drops the singular vectors of the last call, because the step was skipped."""
        self._pending = {}

    def state(self) -> dict[str, Tensor]:
        """The kept vectors (n, R) by matrix shape "RxC", for a checkpoint. Empty before the first commit."""
        return {name: vectors.contiguous() for name, vectors in self._vectors.items()}

    def expected_state(self) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes that `state` has after a commit."""
        return {name: stack[:, :, 0] for name, stack in self._matrices().items()} if self.config.strength else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `state` returned. Raises ValueError if the vectors are those of another model."""
        matrices = self._matrices() if state else {}
        expected = {name: tuple(stack.shape[:2]) for name, stack in matrices.items()}
        found = {name: tuple(vectors.shape) for name, vectors in state.items()}
        if found != expected:
            differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise ValueError(f"singular vectors of the checkpoint do not fit the model's matrices of shape {differing}")
        self._vectors = {name: vectors.to(matrices[name]) for name, vectors in state.items()}
        self._pending = {}

    def _matrices(self) -> dict[str, Tensor]:
        """Effective convolution weights as matrices, equal shapes stacked in registration order: "RxC" -> (n, R, C).

        Columns are in memory order, which saves copies. Singular values and left vectors do not depend on it.
        """
        stacks, single = {}, {}
        for convs, weights in self._weights.stacks():
            name, matrices = _matrix_shape(convs[0]), weights.flatten(2)
            if len(convs) == len(self._convs[name]):
                stacks[name] = matrices
            else:
                single.update(zip(convs, matrices.unbind(0), strict=True))
        for name, convs in self._convs.items():
            if name not in stacks:
                stacks[name] = torch.stack([single[conv] for conv in convs])
        return {name: at_least_float32(stacks[name]) for name in self._convs}

    def _first_vectors(self, name: str, matrices: Tensor) -> Tensor:
        """Random unit vectors (n, R), a function of the seed and the shape: the same on every process and device."""
        generator = torch.Generator().manual_seed(sample_seed(self._seed, f"spectral {name}", 0))
        vectors = torch.randn(matrices.shape[:2], generator=generator).to(matrices)
        return normalize(vectors, dim=1, eps=SMALLEST_NORM)


def _matrix_shape(conv: nn.Conv2d) -> str:
    return f"{conv.out_channels}x{conv.in_channels // conv.groups * math.prod(conv.kernel_size)}"
