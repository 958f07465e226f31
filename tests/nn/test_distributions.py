"""Densities against torch.distributions and against their own sums; what survives extreme parameters."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.models.likelihoods import (
    BernoulliLikelihood,
    DiscretizedLogisticLikelihood,
    LogisticMixtureLikelihood,
    NormalLikelihood,
    SquaredErrorLikelihood,
)
from pipeline.nn.distributions import (
    Bernoulli,
    ClampedNormal,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Normal,
    PixelNormal,
    SquaredError,
)

raw = st.floats(-30, 30)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def double(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


# ---- Normal ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(raw, raw, raw, raw, st.floats(-10, 10), st.sampled_from([1.0, 0.7]))
def test_normal_agrees_with_torch_distributions(mean, log_sigma, other_mean, other_log_sigma, z, temperature):
    ours = ClampedNormal(double(mean), double(log_sigma), temperature)
    other = ClampedNormal(double(other_mean), double(other_log_sigma))
    theirs = torch.distributions.Normal(ours.mean, ours.sigma)
    torch.testing.assert_close(ours.log_prob(double(z)), theirs.log_prob(double(z)), rtol=1e-12, atol=1e-12)
    kl = torch.distributions.kl_divergence(theirs, torch.distributions.Normal(other.mean, other.sigma))
    torch.testing.assert_close(ours.kl(other), kl, rtol=1e-12, atol=1e-12)


@given(raw, raw, raw, raw, st.floats(-10, 10))
def test_a_plain_normal_has_no_bounds(mean, log_sigma, other_mean, other_log_sigma, z):
    ours, other = Normal(double(mean), double(log_sigma)), Normal(double(other_mean), double(other_log_sigma))
    theirs, others = (
        torch.distributions.Normal(double(m), double(s).exp())
        for m, s in ((mean, log_sigma), (other_mean, other_log_sigma))
    )
    torch.testing.assert_close(ours.log_prob(double(z)), theirs.log_prob(double(z)), rtol=1e-12, atol=1e-12)
    kl = torch.distributions.kl_divergence(theirs, others)
    torch.testing.assert_close(ours.kl(other), kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.sample(double(z)), double(mean) + double(log_sigma).exp() * double(z))


def test_the_standard_normal_is_like_its_model():
    like = random(2, 3)
    standard = Normal.standard(like)
    assert standard.mean.dtype == torch.float64
    assert torch.equal(standard.sample(like), like)
    torch.testing.assert_close(standard.log_prob(like), torch.distributions.Normal(0.0, 1.0).log_prob(like))


def test_normal_clamps_softly_and_scales_by_temperature_last():
    zeros = torch.zeros(3)
    assert ClampedNormal(zeros, zeros).sigma.tolist() == pytest.approx([1.01] * 3)
    assert ClampedNormal(zeros, zeros, temperature=0.5).sigma.tolist() == pytest.approx([0.505] * 3)
    extreme = ClampedNormal(torch.tensor([-1e9, 1e9]), torch.tensor([-1e9, 1e9]))
    assert extreme.mean.tolist() == pytest.approx([-5, 5])
    assert extreme.sigma.tolist() == pytest.approx([torch.exp(torch.tensor(s)).item() + 0.01 for s in (-5.0, 5.0)])


def test_normal_sample_is_mean_plus_scaled_noise():
    normal = ClampedNormal(random(4, 2, seed=1), random(4, 2, seed=2))
    noise = random(4, 2, seed=3)
    torch.testing.assert_close(normal.sample(noise), normal.mean + normal.sigma * noise)


@pytest.mark.parametrize(
    ("given_dtype", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_half_precision_is_promoted_and_double_kept(given_dtype, computed):
    x = torch.rand(2, 3, 4, 4).to(given_dtype)
    outputs = random(2, 100, 4, 4).to(given_dtype)
    z = ClampedNormal(outputs, outputs)
    assert z.sigma.dtype == z.sample(outputs).dtype == z.log_prob(outputs).dtype == computed
    for likelihood in (Bernoulli(outputs[:, :3]), PixelNormal(ClampedNormal(*outputs[:, :6].chunk(2, 1)))):
        assert likelihood.log_prob(x).dtype == likelihood.mean.dtype == computed
    for likelihood in (
        DiscretizedLogistic(*outputs[:, :6].chunk(2, 1)),
        DiscretizedLogisticMixture(outputs),
    ):
        assert likelihood.log_prob(x).dtype == likelihood.mean.dtype == computed


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_bernoulli_agrees_with_torch_distributions():
    logits, x = random(2, 1, 5, 5), (random(2, 1, 5, 5, seed=1) > 0).double()
    ours, theirs = Bernoulli(logits), torch.distributions.Bernoulli(logits=logits)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.mean, theirs.mean)
    uniform = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = Bernoulli(torch.full_like(uniform, 0.4)).sample(uniform)
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(0.4)).item(), abs=0.01)


def test_pixel_normal_is_the_density_of_y():
    mean, log_sigma, x = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1), random(2, 3, 4, 4, seed=2)
    theirs = torch.distributions.Normal(5 * torch.tanh(mean / 5), torch.exp(5 * torch.tanh(log_sigma / 5)) + 0.01)
    ours = PixelNormal(ClampedNormal(mean, log_sigma))
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(2 * x - 1))
    torch.testing.assert_close(ours.mean, (theirs.mean.clamp(-1, 1) + 1) / 2)
    noise = 10 * random(2, 3, 4, 4, seed=3)
    torch.testing.assert_close(ours.sample(noise), ((theirs.mean + theirs.stddev * noise).clamp(-1, 1) + 1) / 2)


@settings(deadline=None)
@given(st.floats(-1.5, 1.5), st.floats(-12, 60), st.integers(1, 8))
def test_discretized_logistic_sums_to_one(mean, log_scale, bits):
    levels = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
    logistic = DiscretizedLogistic(double(mean), double(log_scale), bits)
    assert logistic.log_prob(levels).exp().sum().item() == pytest.approx(1, abs=1e-7)


def test_discretized_logistic_is_a_difference_of_sigmoids():
    mean, scale, y = 0.2, 0.3, 2 * 100 / 255 - 1
    edges = torch.sigmoid((torch.tensor([y - 1 / 255, y + 1 / 255], dtype=torch.float64) - mean) / scale)
    ours = DiscretizedLogistic(double(mean), torch.log(double(scale))).log_prob(double(100 / 255))
    assert ours.item() == pytest.approx(torch.log(edges[1] - edges[0]).item(), rel=1e-12)


def test_a_scale_far_wider_than_the_bins_gives_density_times_width():
    log_scales = torch.tensor([15.0, 19.9, 20.1, 60.0, 200.0], dtype=torch.float64)
    ours = DiscretizedLogistic(torch.zeros(5, dtype=torch.float64), log_scales).log_prob(double(127 / 255).expand(5))
    torch.testing.assert_close(ours, torch.log(double(2 / 255)) - log_scales - torch.log(double(4)), rtol=1e-9, atol=0)


def naive_mixture_probability(params: list[float], pixel: list[float], bits: int) -> float:
    """One pixel's probability as the definition reads: logits, then (means, log-scales, coefficients) of R, G and B."""
    k, num_steps = len(params) // 10, 2**bits - 1
    weights = torch.softmax(torch.tensor(params[:k], dtype=torch.float64), 0).tolist()
    blocks = [params[k + 3 * k * c : k + 3 * k * (c + 1)] for c in range(3)]
    y = [2 * value - 1 for value in pixel]
    total = 0.0
    for i, weight in enumerate(weights):
        c_red, c_green, c_blue = (math.tanh(block[2 * k + i]) for block in blocks)
        shifts = (0.0, c_red * y[0], c_green * y[0] + c_blue * y[1])
        for block, value, shift in zip(blocks, y, shifts, strict=True):
            mean, scale = block[i] + shift, math.exp(max(block[k + i], -7))
            upper = math.inf if value > 1 - 1e-9 else (value + 1 / num_steps - mean) / scale
            lower = -math.inf if value < -1 + 1e-9 else (value - 1 / num_steps - mean) / scale
            weight *= logistic_mass(lower, upper)
        total += weight
    return total


def logistic_mass(lower: float, upper: float) -> float:
    """sigmoid(upper) - sigmoid(lower), taken in the tail where the two are small."""
    if lower + upper > 0:
        lower, upper = -upper, -lower
    return 1 / (1 + math.exp(-upper)) - (1 / (1 + math.exp(-lower)) if lower > -700 else 0.0)


@pytest.mark.parametrize("pixel", [(0, 0, 0), (255, 255, 255), (10, 200, 90), (128, 0, 255)])
def test_mixture_conditions_each_channel_on_those_before(pixel):
    params, x = 0.7 * random(1, 30, 1, 1), [level / 255 for level in pixel]
    ours = DiscretizedLogisticMixture(params, 8, "exact").log_prob(
        torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1)
    )
    assert ours.item() == pytest.approx(math.log(naive_mixture_probability(params.flatten().tolist(), x, 8)), rel=1e-9)


def all_images(bits: int) -> Tensor:
    """Every RGB image of one pixel, (8^bits, 3, 1, 1)."""
    levels = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
    return torch.tensor(list(itertools.product(levels, repeat=3)), dtype=torch.float64)[:, :, None, None]


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(0, 1000), st.floats(0.1, 3))
def test_exact_mixture_sums_to_one_over_all_images(bits, seed, spread):
    images = all_images(bits)
    params = spread * random(1, 30, 1, 1, seed=seed).expand(len(images), -1, -1, -1)
    assert DiscretizedLogisticMixture(params, bits, "exact").log_prob(images).exp().sum().item() == pytest.approx(
        1, abs=1e-7
    )


def gray_mixture(mean: float, log_scale: float, bits: int, rule: str) -> DiscretizedLogisticMixture:
    """One component, three independent channels of equal parameters; as many pixels as there are levels."""
    params = torch.zeros(2**bits, 10, 1, 1, dtype=torch.float64)
    params[:, [1, 4, 7]], params[:, [2, 5, 8]] = mean, log_scale
    return DiscretizedLogisticMixture(params, bits, rule)


def gray_sum(mean: float, log_scale: float, bits: int, rule: str) -> float:
    """Sum of the probabilities of one channel's levels."""
    levels = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
    images = levels[:, None, None, None].expand(-1, 3, 1, 1)
    return (gray_mixture(mean, log_scale, bits, rule).log_prob(images) / 3).exp().sum().item()


def test_published_rule_counts_the_top_level_twice_at_8_bits_only():
    assert gray_sum(0.9, -3, 8, "published") == pytest.approx(1.127, abs=5e-4)
    assert gray_sum(0.9, -3, 8, "exact") == pytest.approx(1, abs=1e-9)
    assert gray_sum(0.9, -3, 5, "published") == pytest.approx(1, abs=1e-4)
    assert gray_sum(0.9, -3, 5, "published") == pytest.approx(gray_sum(0.9, -3, 5, "exact"), abs=1e-4)


def test_the_rule_of_vdvae_at_8_bits_gives_the_upper_tail_to_the_highest_level_alone():
    assert gray_sum(0.9, -3, 8, "vdvae") == pytest.approx(1, abs=7e-6)
    assert gray_sum(0.9, -3, 8, "vdvae") != gray_sum(0.9, -3, 8, "exact")  # the density for improbable bins


def test_bins_of_vdvae_at_5_bits_overlap():
    """Its 32 levels are 16/255 apart with bins 2/31 wide: probabilities add up to more than 1 in the middle and, with a
    narrow logistic between two levels, to 2 sigmoid(e^7 (1/31 - 8/255)); bright pixels lose the upper tail.
    """

    assert overlapping(0.0, -2.5)[::8].sum().item() == pytest.approx(1.0282, abs=5e-4)
    between = 8 * 15 / 127.5 - 1 + 8 / 255
    narrow = 2 / (1 + math.exp(-math.exp(7) * (1 / 31 - 8 / 255)))
    assert overlapping(between, -7)[::8].sum().item() == pytest.approx(narrow, abs=1e-4)
    assert overlapping(0.99, -4)[::8].sum() < 0.6


def test_vdvae_makes_5_bits_of_8():
    """The eight values of each of the 32 levels have one probability."""
    probabilities = overlapping(0.1, -1.0).view(32, 8)
    assert (probabilities == probabilities[:, :1]).all()
    assert len(probabilities[:, 0].unique()) == 32


def overlapping(mean: float, log_scale: float) -> Tensor:
    """The probability of one channel's values 0 to 255, (256,)."""
    x = torch.arange(256, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 1, 1) / 255
    return (gray_mixture(mean, log_scale, 8, "vdvae_overlapping_5_bit").log_prob(x) / 3).exp().flatten()


def test_mixture_of_equal_components_is_one_component():
    one = random(2, 10, 3, 3)
    many = torch.cat([one[:, :1].expand(-1, 4, -1, -1), one[:, 1:].repeat_interleave(4, dim=1)], dim=1)
    x = torch.randint(0, 256, (2, 3, 3, 3), generator=torch.Generator().manual_seed(0)).double() / 255
    a, b = DiscretizedLogisticMixture(one), DiscretizedLogisticMixture(many)
    torch.testing.assert_close(a.log_prob(x), b.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.mean, b.mean)


def test_a_narrow_component_samples_its_mean():
    params = random(2, 10, 4, 4)
    params[:, [2, 5, 8]] = -7
    mixture = DiscretizedLogisticMixture(params)
    uniforms = torch.full((2, 1, 4, 4), 0.3), torch.full((2, 3, 4, 4), 0.5)
    torch.testing.assert_close(mixture.sample(*uniforms), mixture.mean)


def test_mixture_samples_follow_its_probabilities():
    """Each gray level's frequency among rounded samples of one channel against its probability, 3 bits."""
    generator, n = torch.Generator().manual_seed(0), 200_000
    mixture = DiscretizedLogisticMixture(0.5 * random(1, 20, 1, 1).expand(n, -1, -1, -1), bits=3, bin_rule="exact")
    u_mixture = torch.rand(n, 2, 1, 1, dtype=torch.float64, generator=generator)
    u_logistic = torch.rand(n, 3, 1, 1, dtype=torch.float64, generator=generator)
    red = torch.round(mixture.sample(u_mixture, u_logistic)[:, 0].flatten() * 7)
    frequencies = torch.bincount(red.long(), minlength=8) / n
    images = all_images(3)
    once_each = DiscretizedLogisticMixture(0.5 * random(1, 20, 1, 1).expand(len(images), -1, -1, -1), 3, "exact")
    probabilities = once_each.log_prob(images).exp().view(8, -1).sum(1)
    torch.testing.assert_close(frequencies.double(), probabilities, atol=5e-3, rtol=0)


@pytest.mark.parametrize("rule", ["published", "exact", "vdvae"])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
def test_mixture_in_float32_is_close_and_its_gradient_finite(rule, size):
    params = (size * random(2, 40, 8, 8)).float().requires_grad_()
    x = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255.0
    log_prob = DiscretizedLogisticMixture(params, 8, rule).log_prob(x)
    exact = DiscretizedLogisticMixture(params.double(), 8, rule).log_prob(x.double())
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("rule", ["published", "exact"])
def test_mixture_gradient(rule):
    x = torch.tensor([0, 254, 255, 100, 3, 77]).view(1, 3, 1, 2).double() / 255
    params = random(1, 20, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: DiscretizedLogisticMixture(p, 8, rule).log_prob(x), params)


def test_mixture_refuses_channels_that_are_no_mixture():
    with pytest.raises(ValueError, match="10 channels per component, got 12"):
        DiscretizedLogisticMixture(torch.zeros(1, 12, 2, 2))


# ---- squared error and fixed variance --------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "low"), [("sigmoid", 0), ("tanh", -1)])
def test_squared_error_is_a_normal_of_variance_one_half_without_its_normalizer(output, low):
    raw_outputs, x = random(2, 3, 4, 4), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    ours = SquaredErrorLikelihood(output=output).build(raw_outputs, 8)
    target, center = (x, torch.sigmoid(raw_outputs)) if output == "sigmoid" else (2 * x - 1, torch.tanh(raw_outputs))
    normal = torch.distributions.Normal(center, math.sqrt(0.5))
    torch.testing.assert_close(ours.log_prob(x), normal.log_prob(target) + 0.5 * math.log(math.pi))
    torch.testing.assert_close(-ours.log_prob(x).sum(), torch.nn.functional.mse_loss(center, target, reduction="sum"))
    torch.testing.assert_close(ours.mean, (center - low) / (1 - low))
    assert not ours.log_prob(ours.mean).abs().max() > 1e-20


def test_a_normal_of_fixed_sigma_takes_one_output_per_channel():
    section = NormalLikelihood(sigma=0.3)
    outputs, x = random(2, 3, 4, 4), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    ours = section.build(outputs, 8)
    assert section.num_outputs(3) == 3
    theirs = torch.distributions.Normal(outputs, 0.3)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(2 * x - 1))
    torch.testing.assert_close(ours.mean, (outputs.clamp(-1, 1) + 1) / 2)


# ---- sections --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "channels", "num_outputs", "distribution"),
    [
        (BernoulliLikelihood(), 1, 1, Bernoulli),
        (LogisticMixtureLikelihood(num_components=4), 3, 40, DiscretizedLogisticMixture),
        (NormalLikelihood(), 3, 6, PixelNormal),
        (NormalLikelihood(sigma=0.1), 3, 3, PixelNormal),
        (SquaredErrorLikelihood(), 3, 3, SquaredError),
        (DiscretizedLogisticLikelihood(), 1, 2, DiscretizedLogistic),
    ],
)
def test_sections_build_their_distribution(section, channels, num_outputs, distribution):
    assert section.num_outputs(channels) == num_outputs
    built = section.build(random(2, num_outputs, 4, 4), bits=5)
    assert isinstance(built, distribution)
    assert built.mean.shape == (2, channels, 4, 4)
    assert getattr(built, "bits", 5) == 5


def test_mixture_of_gray_images_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="needs 3 image channels, the data has 1; use bernoulli"):
        LogisticMixtureLikelihood().num_outputs(1)
