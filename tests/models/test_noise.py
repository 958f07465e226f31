"""Latent noise depends on (seed, stream, position) and nothing else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.base import LatentGroup
from pipeline.models.noise import draw_noise

GROUPS = (LatentGroup("1x1_group00", (2, 1, 1)), LatentGroup("2x2_group00", (3, 2, 2)))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=12, unique=True), st.data())
def test_a_samples_noise_does_not_depend_on_its_batch(positions, data):
    cut = data.draw(st.integers(0, len(positions)))
    whole = draw_noise(GROUPS, 3, "train", positions)
    parts = [draw_noise(GROUPS, 3, "train", part) for part in (positions[:cut], positions[cut:])]
    for group, noise in enumerate(whole):
        assert noise.shape == (len(positions), *GROUPS[group].shape)
        assert torch.equal(noise, torch.cat([part[group] for part in parts]))


def test_seeds_streams_and_positions_give_other_noise():
    variants = [(1, "train", 0), (2, "train", 0), (1, "validate/0", 0), (1, "train", 1), (1, "train", 2**40)]
    noises = [draw_noise(GROUPS, seed, stream, [position])[1].flatten() for seed, stream, position in variants]
    assert len({tuple(noise.tolist()) for noise in noises}) == len(variants)


def test_it_is_standard_normal_within_and_across_samples():
    noise = torch.cat([part.flatten(1) for part in draw_noise(GROUPS, 5, "train", range(4000))], dim=1)  # (4000, 14)
    covariance = torch.cov(noise.T)
    assert noise.mean(0).abs().max() < 5 / 4000**0.5
    assert (covariance - torch.eye(14)).abs().max() < 0.1
    assert abs(noise.pow(4).mean().item() - 3) < 0.15  # the fourth moment of a standard normal
    between = (noise[1:] * noise[:-1]).mean().item()
    assert abs(between) < 5 / noise.numel() ** 0.5


def test_precision_only_casts_it():
    single = draw_noise(GROUPS, 3, "train", [7])
    double = draw_noise(GROUPS, 3, "train", [7], dtype=torch.float64)
    assert all(torch.equal(a.double(), b) for a, b in zip(single, double, strict=True))


def test_the_values_never_change():
    """A change here would silently change every resumed run."""
    noise = torch.cat([part.flatten() for part in draw_noise(GROUPS, 1, "train", [0])])
    expected = torch.tensor([1.8434858, 0.3799101, 0.5796725, -0.6417156])
    torch.testing.assert_close(noise[:4], expected, rtol=1e-6, atol=0)
