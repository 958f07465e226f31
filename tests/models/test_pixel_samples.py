"""Images sampled from p(x | z): distributed as the likelihood says, and a function of (seed, position)."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.models.pixel_samples import sample_pixels
from pipeline.nn.distributions import (
    Bernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Normal,
    PixelNormal,
    SquaredError,
)

COUNT = 4000


def repeated(*values: float) -> Tensor:
    """(COUNT, channels, 1, 1)."""
    return torch.tensor(values)[None, :, None, None].repeat(COUNT, 1, 1, 1)


def test_samples_of_bernoulli_pixels_are_binary_with_their_mean():
    samples = sample_pixels(Bernoulli(repeated(-1.0, 2.0)), 3, range(COUNT)).squeeze()
    assert set(samples.unique().tolist()) == {0.0, 1.0}
    shares = torch.sigmoid(torch.tensor([-1.0, 2.0]))
    assert (samples.mean(0) - shares).abs().max() < 4 * 0.5 / COUNT**0.5


def test_samples_of_normal_pixels_have_their_mean_and_sigma():
    distribution = PixelNormal(Normal(repeated(0.1, -0.2), repeated(math.log(0.1), math.log(0.2))))
    samples = 2 * sample_pixels(distribution, 3, range(COUNT)).squeeze() - 1  # (COUNT, 2)
    assert samples.mean(0).tolist() == pytest.approx([0.1, -0.2], abs=4 * 0.2 / COUNT**0.5)
    assert samples.std(0).tolist() == pytest.approx([0.1, 0.2], rel=0.05)


def test_samples_of_logistic_pixels_fall_into_bins_as_the_likelihood_says():
    """At 2 bits: the share of samples nearest to each of the four levels is its probability."""
    distribution = DiscretizedLogistic(repeated(0.2), repeated(-1.5), bits=2)
    levels = (3 * sample_pixels(distribution, 3, range(COUNT))).round().flatten().long()
    shares = levels.bincount(minlength=4) / COUNT
    expected = [distribution.log_prob(torch.full((COUNT, 1, 1, 1), k / 3))[0].exp().item() for k in range(4)]
    assert sum(expected) == pytest.approx(1, abs=1e-5)
    assert shares.tolist() == pytest.approx(expected, abs=4 * 0.5 / COUNT**0.5)


def test_samples_of_mixtures_fall_into_bins_as_the_likelihood_says():
    """Of red, at 2 bits, for two components and channels that depend on each other."""
    params = repeated(*torch.randn(20, generator=torch.Generator().manual_seed(1)).tolist())
    params[:, 4:6] = -1.5  # log-scales of red
    distribution = DiscretizedLogisticMixture(params, bits=2, bin_rule="exact")
    levels = (3 * sample_pixels(distribution, 3, range(COUNT))).round().squeeze().long()  # (COUNT, 3)
    for red in range(4):
        colors = torch.cartesian_prod(torch.tensor([red]), torch.arange(4), torch.arange(4)) / 3  # (16, 3)
        some = DiscretizedLogisticMixture(params[:16], bits=2, bin_rule="exact")
        expected = some.log_prob(colors[:, :, None, None]).exp().sum().item()
        assert (levels[:, 0] == red).float().mean().item() == pytest.approx(expected, abs=4 * 0.5 / COUNT**0.5)


def test_samples_are_a_function_of_seed_and_position():
    distribution = Bernoulli(repeated(*[0.0] * 30))
    samples = sample_pixels(distribution, 3, range(COUNT))
    part = sample_pixels(Bernoulli(repeated(*[0.0] * 30)[:2]), 3, [7, 40])
    assert torch.equal(part, samples[[7, 40]])
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(sample_pixels(distribution, 4, range(COUNT))[0], samples[0])


def test_a_likelihood_without_normalization_has_no_samples():
    with pytest.raises(ValueError, match="squared_error is not a probability distribution"):
        sample_pixels(SquaredError(repeated(0.0), "sigmoid"), 3, range(COUNT))
