"""Efficient-VDVAE against numbers of its reference release, in float64: three variants of its options."""

from math import log

import pytest
import torch
from torch import Tensor

from pipeline.models.base import recompute_activations
from pipeline.models.efficient_vdvae import EfficientVDVAE
from pipeline.training.objective import Objective, ObjectiveConfig
from tests.helpers import golden
from tests.helpers.efficient_vdvae_cases import config_from_release, name_from_release
from tests.helpers.golden import close

VARIANTS = ("std", "logstd_residual", "std_residual_k3")


@pytest.fixture(scope="module")
def files() -> dict:
    if golden.golden_folder() is None:
        pytest.skip("NVAE_GOLDEN_DIR is not set")
    return golden.load(golden.golden_folder() / "vdvae" / "vdvae_efficient.pt")


@pytest.fixture(params=VARIANTS)
def file(request, files) -> dict:
    return files[request.param]


def build(file: dict) -> EfficientVDVAE:
    size = file["args"]["target_res"]
    model = EfficientVDVAE(config_from_release(file["args"]), (3, size, size)).double()
    state = {name_from_release(name, file["args"]): value for name, value in file["state_dict"].items()}
    assert len(state) == len(file["state_dict"])
    model.load_state_dict(golden.double(state))
    return model


def images(file: dict) -> Tensor:
    return file["x_uint8"].double() / 255


def test_there_are_no_other_variants(files):
    assert files.keys() == {"format", "name", *VARIANTS}


@torch.no_grad()
def test_bound(file):
    model, x, eps = build(file), images(file), golden.noise(file)
    close(model.network_input(x), file["x"])
    out = model(x, eps)
    close(-out.log_px.mean() / model.num_dimensions, file["recon_per_dim"])
    close(out.kl.mean(0) / model.num_dimensions, file["kl_per_dim"])
    outputs, latents = model.infer(x, eps)
    close(outputs, file["logits"])
    normals = model.normals
    raw = file["args"]["distribution_base"] == "logstd"  # the file has the logarithm of sigma before smoothing
    for latent, group in zip(latents, file["groups"], strict=True):
        prior = normals.prior(latent.raw_prior)
        posterior = normals.posterior(latent.raw_posterior, latent.raw_prior)
        for found, expected in ((posterior, group["q"]), (prior, group["p"])):
            close(found.mean, expected[0])
            close(found.log_sigma / normals.beta if raw else found.sigma, expected[1])


STEPS = 20_000


def loss(model: EfficientVDVAE, file: dict, step: int) -> tuple[Tensor, Tensor]:
    """The loss of the release in nats per dimension, and the KL without weights in bits per dimension. Its first step
    is step 1.
    """
    args, out = file["args"], model(images(file), golden.noise(file))
    start = args["vae_beta_anneal_start"]
    config = ObjectiveConfig(
        kl_warmup_delay=(start - 1) / STEPS,
        kl_warmup_portion=(start + args["vae_beta_anneal_steps"]) / STEPS,
        kl_warmup_floor=args["vae_beta_min"],
        kl_balancing="kl_per_element" if args["scaled_gamma"] else "kl",
        kl_balancing_portion=args["gamma_max_steps"] / STEPS,
    )
    total, statistics = Objective(config, model.groups, STEPS)(out, step - 1)
    return total / model.num_dimensions, statistics["kl"] / model.num_dimensions / log(2)


@pytest.mark.parametrize("recompute", ["none", "cells"])
def test_losses_and_gradients(file, recompute):
    """With its schedules: the weight of the KL, and weights of the groups by their KL for the first 10,000 steps."""
    model = build(file)
    recompute_activations(model, recompute)
    assert {1, 1000, 10_000, 10_001} <= {row["step"] for row in file["losses"]}
    for row in file["losses"]:
        total, kl_bits = loss(model, file, row["step"])
        close(total, row["total"])
        close(kl_bits, row["kl_bits"])
    loss(model, file, 1000)[0].backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {name_from_release(name, file["args"]) for name in file["grads"]}
    for name, gradient in file["grads"].items():
        found = parameters[name_from_release(name, file["args"])].grad
        close(found, gradient, what=name, slack=1e-9 * gradient.abs().max().item())


@torch.no_grad()
def test_samples(file):
    """One temperature for each level. That of the output divides the mixture's logits and multiplies its scales."""
    expected, model = file["sample"], build(file)
    counts = [count + 1 for count in file["args"]["down_n_blocks_per_res"]]
    temperatures = [t for t, count in zip(expected["temps"], counts, strict=True) for _ in range(count)]
    outputs, _ = model.generate(golden.noise(file), temperatures)
    close(outputs, expected["logits"])
    mixture, temperature = model.likelihood(outputs), expected["output_temperature"]
    mixture.mixture_logits = mixture.mixture_logits / temperature
    mixture.log_scales = mixture.log_scales + log(temperature)
    image = mixture.sample(expected["u_mix"].double(), expected["u_logistic"].double())
    close(2 * image - 1, expected["sample"])
