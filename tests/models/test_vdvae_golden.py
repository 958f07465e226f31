"""VDVAE against numbers of its reference release, in float64.

The models are built from the options in the files vdvae_small.pt and vdvae_deep.pt of NVAE_GOLDEN_DIR.
"""

from math import log

import pytest
import torch
from torch import Tensor

from pipeline.models.base import VAEOutput, recompute_activations
from pipeline.models.vdvae import VDVAE
from pipeline.models.vdvae_conversion import name_from_reference
from pipeline.tracking.meters import bits_per_dimension
from tests.helpers.golden import close
from tests.helpers.vdvae_cases import VDVAECase, golden_file


@pytest.fixture(scope="module", params=[golden_file("vdvae_small"), golden_file("vdvae_deep")])
def case(request) -> VDVAECase:
    return VDVAECase(request.param)


def test_names_sizes_and_order(case):
    model = case.model()
    names = [name_from_reference(name) for name in case.file["state_dict"]]
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == names
    assert list(case.file["state_dict"]) == case.file["param_order"]
    assert sum(parameter.numel() for parameter in model.parameters()) == case.file["n_params"]
    assert [list(group.shape) for group in model.groups] == case.file["groups"]


def test_initial_weights(case):
    """Uniform within the bounds of the file, which a large tensor nearly reaches; exactly 0 or 1 where they are."""
    torch.manual_seed(1)
    parameters = dict(case.new_model().named_parameters())
    assert len(parameters) == len(case.file["init"])
    for name, bound in case.file["init"].items():
        value = parameters[name_from_reference(name)].detach()
        if bound == 0 or name == "decoder.gain":
            assert (value == bound).all(), name
        else:
            assert value.abs().max() <= bound * (1 + 1e-6), name
            assert value.abs().max() >= bound * (1 - 16 / value.numel()), name
            torch.testing.assert_close(value.std(), torch.tensor(bound / 3**0.5), rtol=3 / value.numel() ** 0.5, atol=0)


@torch.no_grad()
def test_inputs(case):
    model, seen = case.model(), []
    model.encoder.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.features(case.x)
    close(seen[0], case.file["x_input"])


def check_output(out: VAEOutput, expected: dict, rtol: float = 1e-9) -> None:
    close(-out.log_px, expected["recon"], rtol, "recon")
    close(out.kl.T, expected["kl_all"], rtol, "kl_all")
    close(out.log_qz, expected["log_q"], rtol, "log_q")
    close(out.log_pz, expected["log_p"], rtol, "log_p")
    close(-out.elbo, expected["nelbo"], rtol, "nelbo")


def output_input(model: VDVAE, seen: list[Tensor]) -> None:
    """Appends what the output convolution gets in each pass."""
    model.decoder.output.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))


@pytest.mark.parametrize("noise", ["eps", "zero"])
@torch.no_grad()
def test_forward(case, noise):
    expected, model, eps, seen = case.file[f"eval_{noise}"], case.model(), case.noise(noise), []
    output_input(model, seen)
    out = model(case.x, eps)
    check_output(out, expected)
    close(torch.stack(out.kl_units), expected["kl_diag"], what="kl_diag")
    close(out.log_px + out.log_pz - out.log_qz, expected["log_iw"], what="log_iw")
    close(seen[0], expected["px_z"], what="px_z")
    outputs, latents = model.infer(case.x, eps)
    close(outputs, expected["logits"], what="logits")
    for latent, group in zip(latents, expected.get("groups", []), strict="groups" in expected):
        posterior = model.normals.posterior(latent.raw_posterior, latent.raw_prior)
        prior = model.normals.prior(latent.raw_prior)
        close(posterior.mean, group["q_mean"])
        close(posterior.log_sigma, group["q_logsigma"])
        close(prior.mean, group["p_mean"])
        close(prior.log_sigma, group["p_logsigma"])
        close(latent.z, group["z"])
    for resolution, feature in expected.get("activations", {}).items():
        close(model.features(case.x)[resolution], feature, what=f"feature at {resolution}")


@torch.no_grad()
def test_forward_in_float32(case):
    model = case.model(torch.float32)
    out = model(case.x.float(), [eps.float() for eps in case.noise()])
    check_output(out, case.file["eval_eps_f32"], rtol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "cells"])
def test_loss_and_gradients(case, recompute):
    """The release's loss is in nats per dimension. Its bins' masses are differences of nearly equal numbers, so its
    gradients are compared within 1e-9 of the largest of each tensor.
    """
    model = case.model()
    recompute_activations(model, recompute)
    out = model(case.x, case.noise())
    loss = -out.elbo.mean() / model.num_dimensions
    close(loss, case.file["eval_eps"]["loss"]["elbo"])
    close(out.kl.sum(1).mean() / model.num_dimensions, case.file["eval_eps"]["loss"]["rate"])
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, gradient in case.file["grads"].items():
        close(parameters[name_from_reference(name)].grad, gradient, what=name, slack=1e-9 * gradient.abs().max().item())
    close(torch.stack([p.grad.norm() for p in parameters.values()]).norm(), case.file["grad_norm"])


@torch.no_grad()
def test_importance_weights(case):
    expected, model = case.file["iw"], case.model()
    features = model.features(case.x)
    outs = [model.bound(case.x, features, case.noise(key)) for key in ("eps", "eps2", "eps3")]
    log_weights = torch.stack([out.log_px + out.log_pz - out.log_qz for out in outs], dim=1)
    close(log_weights, expected["log_iw"])
    close(-torch.stack([out.elbo for out in outs]).mean(), expected["nelbo_mean"])
    close(-(log_weights.logsumexp(dim=1) - log(3)).mean(), expected["neg_log_p"])
    close(bits_per_dimension(1.0, model.num_dimensions), expected["bpd_coeff"])


@torch.no_grad()
def test_prior_samples(case):
    """At one temperature, and at one for each block; the release's bytes are truncated."""
    model, seen = case.model(), []
    output_input(model, seen)
    assert [type(row["temp"]) for row in case.file["sample"]] == [float, float, list]
    for row in case.file["sample"]:
        outputs, _ = model.generate(case.noise(), row["temp"])
        check_sample(model, outputs, seen[-1], row)


@torch.no_grad()
def test_samples_that_continue_posterior_latents(case):
    row, model, seen = case.file["partial"], case.model(), []
    output_input(model, seen)
    given = model.encode(case.x, case.noise())[: row["num_given"]]
    outputs, latents = model.generate(case.noise("eps2"), row["temp"], given=given)
    check_sample(model, outputs, seen[-1], row)
    torch.testing.assert_close(model.decode(latents), model.likelihood(outputs).mean, rtol=0, atol=0)


def check_sample(model: VDVAE, outputs: Tensor, output_input: Tensor, row: dict) -> None:
    close(output_input, row["px_z"], what=f"px_z at temperature {row['temp']}")
    close(outputs, row["logits"], what=f"logits at temperature {row['temp']}")
    image = model.likelihood(outputs).sample(row["u_mix"].to(outputs), row["u_logistic"].to(outputs))
    close(2 * image - 1, row["sample"])
    assert torch.equal((255 * image).cpu().to(torch.uint8), row["sample_uint8"])
