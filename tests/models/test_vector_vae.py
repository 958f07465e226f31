"""What is true of the models with one latent vector, beyond test_models.py."""

import pytest
import torch

from pipeline.models.conv_vae import ConvVAEConfig
from pipeline.models.resnet_vae import ResNetVAEConfig
from tests.helpers.model_cases import CASES, ONE_PER_MODEL, build_case, noise_for

HIERARCHICAL = ("nvae", "vdvae", "efficient_vdvae")
VECTOR_CASES = [case for case, (section, _, _) in CASES.items() if section["name"] not in HIERARCHICAL]
LIKELIHOODS = (
    "{name: bernoulli}",
    "{name: normal}",
    "{name: normal, sigma: 0.1}",
    "{name: squared_error, output: sigmoid}",
    "{name: squared_error, output: tanh}",
    "{name: discretized_logistic}",
    "{name: logistic_mixture, num_components: 2, bin_rule: exact}",
)
each_vector_case = pytest.mark.parametrize("case", VECTOR_CASES)


@each_vector_case
@torch.no_grad()
def test_the_prior_is_standard_normal_and_temperature_scales_it(case):
    """The log p(z) of the output is that of the latents which `encode` returns."""
    model, x, noise, condition = build_case(case)
    model.eval()
    (z,) = model.encode(x, noise, condition)
    log_pz = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(model(x, noise, condition).log_pz, log_pz)
    decoded = model.decode([noise[0] / 2], condition)
    torch.testing.assert_close(model.sample(noise[:1], 0.5, condition), decoded, rtol=0, atol=0)


@each_vector_case
@torch.no_grad()
def test_log_px_is_that_of_the_decoded_latent_without_the_border(case):
    model, x, noise, condition = build_case(case, "data.size=12", "data.pad=2")
    model.eval()
    raw = model._decode(model.encode(x, noise, condition)[0].flatten(1), condition)[:, :, 2:-2, 2:-2]
    expected = model.likelihood(raw).log_prob(x[:, :, 2:-2, 2:-2]).flatten(1).sum(1)
    torch.testing.assert_close(model(x, noise, condition).log_px, expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", [case for case in ONE_PER_MODEL.values() if case in VECTOR_CASES])
def test_every_model_supports_every_likelihood(case, likelihood):
    model, x, noise, condition = build_case(case, f"model.likelihood={likelihood}")
    (-model(x, noise, condition).elbo.mean()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad is not None for p in model.parameters()) > 5
    images = model.sample(noise, 1.0, condition)
    assert images.shape == x.shape
    assert 0 <= images.min() <= images.max() <= 1


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (ConvVAEConfig(), 28, "conv_vae: image size 28 is not a multiple of 8; 24 or 32 would work: pad"),
        (ConvVAEConfig(), 4, "conv_vae: image size 4 is not a multiple of 8; 8 would work"),
        (ResNetVAEConfig(), 40, "resnet_vae: image size 40 is not a multiple of 16; 32 or 48 would work"),
    ],
)
def test_a_size_that_cannot_be_halved_is_refused_and_others_suggested(config, size, message):
    with pytest.raises(ValueError, match=message):
        config.build((3, size, size), 0, 8)


@pytest.mark.parametrize("size", [(8, 24), (32, 16)])
@pytest.mark.parametrize(
    "config", [ConvVAEConfig(width=2, latent_size=3), ResNetVAEConfig(stem_width=2, stage_widths=(3, 4), latent_size=3)]
)
def test_images_need_not_be_square(config, size):
    model = config.build((3, *size), 0, 8).double()
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    assert model.reconstruct(x, noise_for(model, 2, torch.float64)).shape == x.shape
