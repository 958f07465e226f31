"""Flip, binarize, pad and scale: pure functions of (seed, epoch, index), exact where exactness can be had."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.preprocess import Preprocess, to_model_input, turns_on

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def images_like(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def run(preprocess: Preprocess, images: np.ndarray, epoch: int = 0) -> np.ndarray:
    return preprocess(images, np.full(len(images), epoch), np.arange(len(images)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", [0, 2])
def test_channels_come_first_and_the_border_is_black(channels, pad):
    images = images_like(5, 6, 7, channels)
    out = run(Preprocess(seed=1, pad=pad), images)
    assert out.flags.c_contiguous
    assert out.dtype == np.uint8
    expected = np.pad(np.moveaxis(images, 3, 1), [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    np.testing.assert_array_equal(out, expected)


def test_flip_mirrors_half_of_the_images_and_nothing_else():
    images = images_like(4000, 2, 5, 3)
    plain = run(Preprocess(seed=3, pad=1), images)
    flipped = run(Preprocess(seed=3, flip=True, pad=1), images)
    same = (flipped == plain).all(axis=(1, 2, 3))
    mirrored = (flipped == plain[..., ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 0.03  # four deviations
    again = run(Preprocess(seed=3, flip=True, pad=1), images, epoch=1)
    changed = (again != flipped).any(axis=(1, 2, 3)).mean()
    assert abs(changed - 0.5) < 0.03  # epochs are independent of each other


@settings(deadline=None)
@given(
    st.integers(-(2**62), 2**62),
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 9)), min_size=1, max_size=12),
    st.integers(1, 11),
)
def test_a_sample_does_not_depend_on_its_batch(seed, samples, cut):
    """Whole batch, cut batch, reversed batch: each sample comes out the same."""
    epochs, indices = (np.array(column) for column in zip(*samples, strict=True))
    images = images_like(10, 3, 5, 1)[indices]
    preprocess = Preprocess(seed, flip=True, binarize="dynamic", pad=1)
    whole = preprocess(images, epochs, indices)
    parts = [preprocess(images[s], epochs[s], indices[s]) for s in (slice(0, cut), slice(cut, None)) if len(images[s])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(preprocess(images[::-1], epochs[::-1], indices[::-1])[::-1], whole)


def test_binarizing_has_the_right_probability_for_each_value():
    """65,536 samples of each of the 256 values: frequencies within five deviations, 0 never and 255 always."""
    values = np.arange(256)
    images = np.broadcast_to(values.astype(np.uint8)[None, :, None, None], (4096, 256, 16, 1))
    on = run(Preprocess(seed=7, binarize="dynamic"), images)
    assert set(np.unique(on).tolist()) == {0, 255}
    frequency = (on == 255).mean(axis=(0, 1, 3))
    probability = values / 255
    deviation = np.sqrt(probability * (1 - probability) / 65536)
    assert frequency[0] == 0
    assert frequency[255] == 1
    assert (np.abs(frequency - probability) <= 5 * deviation).all()
    assert abs((((frequency - probability)[1:-1] / deviation[1:-1]) ** 2).mean() - 1) < 0.5  # neither too even


def test_binarizing_compares_with_the_exact_threshold():
    top = 2**32 - 1
    for value in range(256):
        threshold = value * top // 255
        assert threshold * 255 == value * top
        draws = np.array([0, max(threshold, 1) - 1, min(threshold, top), top], np.uint32)
        on = turns_on(draws, np.full(4, value, np.uint8)).tolist()
        assert on == [value > 0, value > 0, value == 255, value == 255]


def test_binarizing_equals_plain_integers():
    """One sample restated without arrays: hash of (seed, stream, epoch, index), then SplitMix64, low half first."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    state = 0
    for word in (-9, 4, 3, 6):
        state = mix(((state + GAMMA) & MASK) ^ (word & MASK))
    image = images_like(1, 3, 5, 1)
    hashes = [mix((state + step * GAMMA) & MASK) for step in range(1, 9)]
    draws = [half for number in hashes for half in (number & 0xFFFFFFFF, number >> 32)][:15]
    expected = [255 * (draw * 255 < int(value) * (2**32 - 1)) for draw, value in zip(draws, image.ravel(), strict=True)]
    out = Preprocess(-9, binarize="dynamic")(image, np.array([3]), np.array([6]))
    assert out.ravel().tolist() == expected


def test_pixels_and_samples_and_epochs_are_independent():
    """Correlations of fair coins between neighbours in every direction stay within five deviations of zero."""
    gray = np.full((2000, 8, 8, 3), 127, np.uint8)
    signs = [run(Preprocess(seed=2, binarize="dynamic"), gray, epoch) / 127.5 - 1 for epoch in (0, 1)]
    first = signs[0] - signs[0].mean()
    for axis in range(4):
        for distance in (1, 2):
            shifted = np.roll(first, distance, axis)
            assert abs((first * shifted).mean()) < 5 / np.sqrt(first.size)
    assert abs((signs[0] * signs[1]).mean()) < 5 / np.sqrt(first.size)


def test_draws_are_frozen():
    """Literal numbers: a change here changes validation figures and every run that is resumed."""
    gray = np.full((4, 2, 4, 1), 128, np.uint8)
    on = run(Preprocess(seed=1, binarize="dynamic"), gray, epoch=2) // 255
    assert ["".join(map(str, image.ravel())) for image in on] == ["10000011", "11001010", "01000010", "10110101"]
    ramp = np.arange(40, dtype=np.uint8).reshape(20, 1, 2, 1)
    flipped = run(Preprocess(seed=1, flip=True), ramp, epoch=2)[:, 0, 0, 0] % 2
    assert "".join(map(str, flipped)) == "00010101111001011000"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaling_equals_the_specification(bits, dtype):
    """Section 7.4: for an input x = u / 255 in [0, 1], level = floor(x 255 / 2^(8-b)), x <- level / (2^b - 1)."""
    u = torch.arange(256, dtype=torch.uint8)
    x = torch.arange(256, dtype=dtype) / 255
    expected = x if bits == 8 else torch.floor(x * 255 / 2 ** (8 - bits)) / (2**bits - 1)
    out = to_model_input(u, bits, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert out.min() == 0
    assert out.max() == 1
    assert len(out.unique()) == 2**bits


def test_scaling_in_bfloat16_rounds_once():
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_model_input(u, dtype=torch.bfloat16), (u.double() / 255).to(torch.bfloat16))


def test_scaling_keeps_shape_and_leaves_the_images_alone():
    images = torch.from_numpy(images_like(2, 3, 4, 5))
    before = images.clone()
    assert to_model_input(images, 5).shape == images.shape
    assert torch.equal(images, before)


def test_scaling_equals_the_golden_values():
    folder = os.environ.get("NVAE_GOLDEN_DIR")
    if not folder:
        pytest.skip("NVAE_GOLDEN_DIR is not set")
    golden = torch.load(Path(folder) / "units.pt", weights_only=True)["quantise"]
    u = torch.arange(256, dtype=torch.uint8)
    for bits, expected in golden.items():
        assert torch.equal(to_model_input(u, bits, torch.float32), expected["f32"])
        assert torch.equal(to_model_input(u, bits, torch.float64), expected["f64"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scaling_on_a_gpu_equals_the_cpu_bit_for_bit(bits, dtype):
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_model_input(u.cuda(), bits, dtype).cpu(), to_model_input(u, bits, dtype))
