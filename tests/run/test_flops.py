"""FLOPs are those of the convolutions, counted by hand for a network that is small enough."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.models.base import VAE, LatentGroup, VAEOutput
from pipeline.recipe import build_model
from pipeline.run.flops import peak_flops, step_flops
from tests.helpers.model_cases import ONE_PER_MODEL, make_recipe


class OneConvolution(VAE):
    """Not a sensible model: one 3x3 convolution, 3 -> 5 channels, on 8x8 images."""

    groups = (LatentGroup("1x1_group00", (2, 1, 1)),)

    def __init__(self):
        super().__init__((3, 8, 8))
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def features(self, x, condition=None):
        return self.conv(x).flatten(1).sum(1)

    def bound(self, x, features, noise, condition=None):
        return VAEOutput(features, features[:, None], features, features, (features,))

    def encode(self, x, noise, condition=None):
        return list(noise)

    pixel_distribution = None  # decode is enough here

    def decode(self, latents, condition=None):
        return latents[0].new_zeros(len(latents[0]), *self.image_shape)

    def sample_with_latents(self, noise, temperature=1.0, condition=None, given=()):
        return self.decode(noise), noise

    def prior_noise(self, latents, condition=None):
        return list(latents)


@pytest.mark.parametrize("case", ONE_PER_MODEL.values())
def test_every_model_is_counted_on_the_meta_device(case):
    """As a run on a GPU does for perf/mfu; some operators refuse that device."""
    with torch.device("meta"):
        model = build_model(make_recipe(case, Path()))
    assert step_flops(model, batch_size=2) == 2 * step_flops(model, batch_size=1) > 1e5


def test_a_convolution_counts_two_for_each_product_and_three_passes():
    with torch.device("meta"):
        model = OneConvolution()
    by_hand = 2 * (3 * 3 * 3) * 5 * (8 * 8)  # multiply and add, per tap, output channel and pixel
    assert step_flops(model, batch_size=7) == 3 * 7 * by_hand


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312e12),
        ("CPU", "bf16", None),
        ("NVIDIA H100", "fp32", None),
    ],
)
def test_peaks_are_known_or_not_claimed(device, precision, peak):
    assert peak_flops(device, precision) == peak
