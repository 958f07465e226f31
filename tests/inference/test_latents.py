"""Interpolation between latents, and mean differences, compared with plain NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference.latents import MeanDifference, added, linear, moved, spherical

SHAPES = [(2, 4, 4), (3, 2, 2)]


def latents(seed: int, count: int = 1, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *shape, generator=generator, dtype=dtype) for shape in SHAPES]


seeds = st.integers(0, 2**31)


@given(seeds, seeds)
def test_both_interpolations_include_the_ends(one, other):
    start, end = latents(one), latents(other)
    for way in (linear, spherical):
        for group, a, b in zip(way(start, end, torch.tensor([0.0, 1.0])), start, end, strict=True):
            torch.testing.assert_close(group, torch.cat([a, b]), rtol=1e-9, atol=1e-9)


@given(seeds, seeds, st.floats(-1, 2))
def test_linear_interpolation_is_a_line(one, other, weight):
    start, end = latents(one), latents(other)
    for group, a, b in zip(linear(start, end, torch.tensor([weight])), start, end, strict=True):
        expected = a.numpy() + np.float32(weight) * (b.numpy() - a.numpy())
        np.testing.assert_allclose(group.numpy(), expected, rtol=1e-9, atol=1e-9)


@given(seeds, seeds, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_spherical_interpolation_has_constant_speed(one, other, weights):
    """Between vectors of length one it stays on the sphere, at the angle w o from the start; each group on its own."""
    start = [group / group.norm() for group in latents(one)]
    end = [group / group.norm() for group in latents(other)]
    w = torch.tensor(weights, dtype=torch.float64)
    for group, a, b in zip(spherical(start, end, w), start, end, strict=True):
        whole = torch.dot(a.flatten(), b.flatten()).clamp(-1, 1).acos()
        if one == other:
            continue
        torch.testing.assert_close(group.flatten(1).norm(dim=1), torch.ones(len(w)).double(), rtol=1e-7, atol=1e-7)
        turned = (group.flatten(1) @ a.flatten()).clamp(-1, 1).acos()
        torch.testing.assert_close(turned, w * whole, rtol=1e-5, atol=1e-5)


@given(seeds, st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 1))
def test_lengths_grow_evenly_enough(seed, long, short, weight):
    """Of normal draws the norm along the circle stays near the norms of the ends; along the line it sinks."""
    start, end = latents(seed), latents(seed + 1)
    (way, *_), (line, *_) = spherical(start, end, torch.tensor([0.5])), linear(start, end, torch.tensor([0.5]))
    assert float(way.norm()) > float(line.norm())
    scaled = spherical([long * g for g in start], [short * g for g in end], torch.tensor([weight], dtype=torch.float64))
    assert all(bool(group.isfinite().all()) for group in scaled)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, 0.0])
def test_without_a_unique_circle_it_is_linear(factor):
    start = latents(3)
    end = [factor * group for group in start]
    weights = torch.linspace(0, 1, 5, dtype=torch.float64)
    for found, expected in zip(spherical(start, end, weights), linear(start, end, weights), strict=True):
        torch.testing.assert_close(found, expected)
        assert bool(found.isfinite().all())


def test_dtypes_are_kept():
    for dtype in (torch.float32, torch.float64):
        start, end = latents(1, dtype=dtype), latents(2, dtype=dtype)
        for way in (linear, spherical):
            assert {group.dtype for group in way(start, end, torch.linspace(0, 1, 3))} == {dtype}


def test_moving_is_adding():
    start, direction = latents(1), latents(2)
    for group, a, b in zip(moved(start, direction, torch.tensor([0.0, -2.0])), start, direction, strict=True):
        torch.testing.assert_close(group, torch.cat([a, a - 2 * b]))


@given(seeds, st.lists(st.sampled_from([-1, 0, 1]), min_size=2, max_size=12), st.integers(1, 5))
def test_mean_differences_are_numpys(seed, present, part):
    """Any cut into batches; unknown ones do not count; one kind alone is an error."""
    groups, marks = latents(seed, len(present)), torch.tensor(present, dtype=torch.int8)
    difference = MeanDifference()
    for start in range(0, len(present), part):
        difference.add([group[start : start + part] for group in groups], marks[start : start + part])
    if not {0, 1} <= set(present):
        with pytest.raises(ValueError, match="both are needed"):
            difference.direction()
        return
    marks = np.asarray(present)
    for found, group in zip(difference.direction(), groups, strict=True):
        expected = group.numpy()[marks == 1].mean(0) - group.numpy()[marks == 0].mean(0)
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_directions_add_up():
    one, other = latents(1), latents(2)
    for found, a, b in zip(added([(1.0, one), (-0.5, other)]), one, other, strict=True):
        torch.testing.assert_close(found, a - 0.5 * b)
