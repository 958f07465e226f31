"""The kernel distance of two sets of features, the KID where they are Inception's (Binkowski et al. 2018, "Demystifying
MMD GANs", section 4)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pipeline.models.noise import sample_seed


def kernel_distance(
    real: Tensor,
    fake: Tensor,
    subsets: int,
    size: int,
    seed: int,
    share: Callable[[int], Iterable[int]] = range,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> dict[str, float]:
    """`kid`: the mean over `subsets` pairs of random subsets of `size` features each of the squared maximum mean
    discrepancy, and `kid_std`: its standard deviation over the subsets.

    real (n, d), fake (m, d). Subset i is a function of (seed, i). A rank computes the subsets `share(subsets)`, and
    `total` sums a tensor over ranks: the figures are equal on any number of ranks. Raises ValueError where a set has
    fewer than `size` features.
    """
    if size < 2 or min(len(real), len(fake)) < size:
        raise ValueError(f"subsets of {size} features need as many, and at least 2; there are {len(real)}, {len(fake)}")
    found = torch.zeros(subsets, dtype=torch.float64, device=real.device)
    for i in share(subsets):
        found[i] = squared_discrepancy(
            real[choose(len(real), size, seed, "kid real", i).to(real.device)].double(),
            fake[choose(len(fake), size, seed, "kid fake", i).to(fake.device)].double(),
        )
    found = total(found)
    return {"kid": found.mean().item(), "kid_std": found.std(correction=0).item()}


def choose(count: int, size: int, seed: int, stream: str, number: int) -> Tensor:
    """`size` different numbers below `count`, at random by (seed, stream, number)."""
    generator = torch.Generator().manual_seed(sample_seed(seed, stream, number))
    return torch.randperm(count, generator=generator)[:size]


def squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy of x and y (n, d), with the kernel
    (x . y / d + 1)^3. It can be negative.
    """
    n = len(x)
    within = sum(kernel.sum() - kernel.diagonal().sum() for kernel in (cubic_kernel(x, x), cubic_kernel(y, y)))
    return within / (n * (n - 1)) - 2 * cubic_kernel(x, y).mean()


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) for x (n, d) and y (m, d)."""
    return (x @ y.T / x.shape[1] + 1) ** 3
