"""NVAE, objective, regularizers and optimizer against numbers of the NVAE reference release, in float64.

The tests run for every model file of NVAE_GOLDEN_DIR; the model is built from the options in the file. Gradients are
compared with |a - b| <= 1e-9 |b| + 1e-9 of the largest gradient norm, since a gradient of zero has rounding noise.
"""

from functools import cached_property
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.data.preprocess import to_model_input
from pipeline.distributed.device_settings import DeviceSettings
from pipeline.evaluation.sample_grids import readjust_batch_norm
from pipeline.models.base import VAEOutput, recompute_activations
from pipeline.models.nvae import NVAE
from pipeline.models.nvae_conversion import (
    reference_parameter_names,
    state_dict_to_reference,
)
from pipeline.tracking.meters import bits_per_dimension
from pipeline.training.objective import Objective, ObjectiveConfig, balancing_weights, resolution_factors
from pipeline.training.optim import OptimConfig, build_optimizer
from pipeline.training.regularizers import RegularizerConfig, Regularizers
from tests.helpers import golden
from tests.helpers.golden import close, close_buffers
from tests.helpers.nvae_cases import load_reference, nvae_from_reference

if golden.DEVICE != "cpu":
    DeviceSettings(cudnn_benchmark=False, tf32=False).apply()


class Case:
    """One golden file and what is built from its options."""

    def __init__(self, path: Path):
        self.file = golden.load(path)
        self.args = self.file["args"]
        binary = self.args["dataset"] in ("mnist", "omniglot")
        pixels = self.file["x_uint8"] * (255 if binary else 1)  # binary images are stored as 0 and 1
        self.x = to_model_input(pixels.to(golden.DEVICE), self.args["num_x_bits"], torch.float64)

    def model(self, training: bool = False, dtype: torch.dtype = torch.float64) -> NVAE:
        model = nvae_from_reference(self.args)
        load_reference(model, self.file["state_dict"])
        return model.to(golden.DEVICE, dtype).train(training)

    def noise(self, key: str) -> list[Tensor]:
        return golden.noise(self.file, key)

    def objective(self, model: NVAE, total_steps: int) -> Objective:
        config = ObjectiveConfig(
            kl_warmup_portion=self.args["kl_anneal_portion"],
            kl_warmup_delay=self.args["kl_const_portion"],
            kl_warmup_floor=self.args["kl_const_coeff"],
        )
        return Objective(config, model.groups, total_steps)

    def regularizers(self, model: NVAE, iterations: int = 4) -> Regularizers:
        """Starting from the vectors u0 of the file."""
        annealed = self.args["weight_decay_norm_anneal"]
        config = RegularizerConfig(
            strength=self.args["weight_decay_norm"],
            initial_strength=self.args["weight_decay_norm_init"] if annealed else None,
            power_iterations=iterations,
        )
        regularizers = Regularizers(config, model, seed=0)
        regularizers.load_state(self.vectors("u0"))
        return regularizers

    def vectors(self, key: str) -> dict[str, Tensor]:
        """Singular vectors of the file, as a state of `Regularizers`."""
        return {f"{group['rows']}x{group['cols']}": group[key] for group in self.file["spectral"]["groups"]}

    @cached_property
    def eval_model(self) -> NVAE:
        """For tests that do not change it."""
        return self.model()


@pytest.fixture(scope="module", params=golden.model_files())
def case(request) -> Case:
    return Case(request.param)


def backward(model: NVAE, loss: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss.backward()


def named_parameters(model: NVAE) -> dict[str, Tensor]:
    """Parameters by their reference names."""
    return dict(zip(reference_parameter_names(model), model.parameters(), strict=True))


# ---- what the files say about the model


def test_names_sizes_and_order(case):
    model = case.eval_model
    exported = state_dict_to_reference(model.state_dict())
    assert list(exported) == list(case.file["state_dict"])
    for name, tensor in case.file["state_dict"].items():
        assert torch.equal(exported[name], tensor.to(exported[name])), name
    assert reference_parameter_names(model) == case.file["param_order"]
    assert sum(parameter.numel() for parameter in model.parameters()) == case.file["n_params"]
    assert list(model.config.groups_per_scale) == case.file["groups_per_scale"][::-1]
    assert [(len(case.x), *group.shape) for group in model.groups] == [tuple(eps.shape) for eps in case.file["eps"]]


def test_input(case):
    close(torch.stack(case.x.aminmax()), torch.tensor(case.file["x_model_range"]))
    close(case.x.sum(), case.file["x_f64_sum"])


def check_output(out: VAEOutput, expected: dict, rtol: float = 1e-9) -> None:
    close(-out.log_px, expected["recon"], rtol, "recon")
    close(out.kl.T, expected["kl_all"], rtol, "kl_all")
    close(out.log_qz, expected["log_q"], rtol, "log_q")
    close(out.log_pz, expected["log_p"], rtol, "log_p")
    close(-out.elbo, expected["nelbo"], rtol, "nelbo")


@pytest.mark.parametrize("noise", ["eps", "zero"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@torch.no_grad()
def test_forward(case, mode, noise):
    expected, x, eps = case.file[f"{mode}_{noise}"], case.x, case.noise(noise)
    model = case.model(training=mode == "train")
    out = model(x, eps)
    check_output(out, expected)
    close(torch.stack(out.kl_units), expected["kl_diag"], what="kl_diag")
    close(out.log_px + out.log_pz - out.log_qz, expected["log_iw"], what="log_iw")
    if "bn_after" in expected:
        close_buffers(state_dict_to_reference(model.state_dict()), expected["bn_after"])
    logits, latents = case.model(training=mode == "train").infer(x, eps)
    close(logits, expected["logits"], what="logits")
    for latent, group in zip(latents, expected.get("groups", []), strict="groups" in expected):
        close(latent.posterior.mean, group["q_mu"])
        close(latent.posterior.sigma, group["q_sigma"])
        close(latent.prior.mean, group["p_mu"])
        close(latent.prior.sigma, group["p_sigma"])


@torch.no_grad()
def test_forward_in_float32(case):
    eps = [e.float() for e in case.noise("eps")]
    check_output(case.model(dtype=torch.float32)(case.x.float(), eps), case.file["eval_eps_f32"], rtol=1e-5)


@torch.no_grad()
def test_importance_weights(case):
    expected, model = case.file["iw"], case.eval_model
    outs = [model(case.x, case.noise(key)) for key in ("eps", "eps2", "eps3")]
    log_weights = torch.stack([out.log_px + out.log_pz - out.log_qz for out in outs], dim=1)
    close(log_weights, expected["log_iw"])
    close(-torch.stack([out.elbo for out in outs]).mean(), expected["nelbo_mean"])
    close(-(log_weights.logsumexp(dim=1) - log(3)).mean(), expected["neg_log_p"])
    close(bits_per_dimension(1.0, model.num_dimensions), expected["bpd_coeff"])


# ---- regularizers


def test_spectral_term(case):
    expected, model = case.file["spectral"], case.eval_model
    regularizers = case.regularizers(model, iterations=40)
    close(regularizers.spectral(), expected["loss_40_iters"])
    regularizers.commit()
    close_vectors(regularizers.state(), case.vectors("u1"))
    going_on = case.regularizers(model, iterations=4)
    close(going_on.spectral(), expected["loss_4_iters"])
    going_on.commit()
    close_vectors(going_on.state(), case.vectors("u_4"))
    going_on.load_state(regularizers.state())
    loss = going_on.spectral()
    close(loss, expected["loss_40_then_4"])
    assert loss <= expected["exact_sum_sigma_max"] * (1 + 1e-9)


def close_vectors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal vectors in equal order: the order of shapes is that of their first appearance."""
    assert list(actual) == list(expected)
    for name, vectors in expected.items():
        close(actual[name], vectors, what=name)


def test_batch_norm_term(case):
    close(case.regularizers(case.eval_model).batch_norm(), case.file["bn_loss"])


# ---- objective and optimizer


@pytest.mark.parametrize("rule", ["equal", "linear", "sqrt", "square"])
def test_resolution_factors(case, rule):
    close(resolution_factors(case.eval_model.groups, rule), case.file["kl_alpha"][rule])


def test_training_loss_and_gradients(case):
    expected = case.file["train_loss"]
    for row in expected["rows"]:
        model = case.model(training=True)
        total = check_loss(case, row, model, case.regularizers(model), case.noise("eps"), expected["total_iters"])
        if "grad_norm" in row:
            backward(model, total)
            check_gradients(model, row)
    assert any("grad_norm" in row for row in expected["rows"])


@pytest.mark.parametrize("what", ["norms", "cells"])
def test_gradients_with_recomputed_activations(case, what):
    expected = case.file["train_loss"]
    row = next(row for row in expected["rows"] if "grad_norm" in row)
    model = case.model(training=True)
    recompute_activations(model, what)
    total = check_loss(case, row, model, case.regularizers(model), case.noise("eps"), expected["total_iters"])
    backward(model, total)
    check_gradients(model, row)


def check_loss(
    case: Case, row: dict, model: NVAE, regularizers: Regularizers, eps: list[Tensor], total_steps: int
) -> Tensor:
    """The whole training loss at the row's step, with gradient, after comparing it and its parts with the row."""
    step, objective = row["step"], case.objective(model, total_steps)
    out = model(case.x, eps)
    loss, statistics = objective(out, step)
    penalty, _ = regularizers(objective.warmup(step))
    close(objective.beta(step), row["kl_coeff"])
    close(regularizers.strength(objective.warmup(step)), row["wdn_coeff"])
    close(-out.log_px, row["recon"])
    close(objective.charged_kl(out.kl, step), row["balanced_kl"], what=f"balanced KL at step {step}")
    close(torch.stack([statistics[f"kl/{group.name}"] for group in model.groups]), row["kl_group_means"])
    if objective.warmup(step) < 1:
        alpha = torch.tensor(resolution_factors(model.groups, "square")).to(out.kl)
        close(balancing_weights(out.kl.abs().mean(dim=0), alpha), row["kl_group_coeffs"])
    close(regularizers.spectral(), row["norm_loss"])
    close(regularizers.batch_norm(), row["bn_loss"])
    close(loss + penalty, row["total"], what=f"total loss at step {step}")
    return loss + penalty


def check_gradients(model: NVAE, row: dict) -> None:
    parameters = named_parameters(model)
    assert parameters.keys() == row["grad_norm"].keys()
    atol = 1e-9 * max(float(norm) for norm in row["grad_norm"].values())
    for name, parameter in parameters.items():
        found = {"grad_norm": parameter.grad.norm(), "grad_sum": parameter.grad.sum(), "grad_small": parameter.grad}
        for key, value in found.items():
            if name in row[key]:
                expected = torch.as_tensor(row[key][name], dtype=torch.float64)
                # A sum over n elements has n times their allowance.
                allowed = atol * (parameter.numel() ** 0.5 if key == "grad_sum" else 1)
                torch.testing.assert_close(
                    value.cpu(), expected, rtol=1e-9, atol=allowed, msg=lambda t, n=name: f"{n}: {t}"
                )


def test_adamax_trajectory(case):
    expected = case.file["adamax"]
    model = case.model(training=True)
    regularizers = case.regularizers(model)
    config = OptimConfig(
        name="adamax",
        beta1=expected["betas"][0],
        beta2=expected["betas"][1],
        eps=expected["eps"],
        weight_decay=expected["weight_decay"],
    )
    optimizer, parameters = build_optimizer(model, config), named_parameters(model)
    slack = dict.fromkeys(parameters, 0.0)
    for row in expected["steps"]:
        total = check_loss(case, row, model, regularizers, case.noise(row["eps_key"]), expected["total_iters"])
        backward(model, total)
        optimizer.param_groups[0]["lr"] = row["lr"]
        optimizer.step()
        regularizers.commit()
        add_slack(slack, parameters, row["lr"] / expected["eps"])
        check_parameters(parameters, row, slack)
    largest_slack = max(slack.values())  # below 1e-10 unless the loss is huge
    close_buffers(state_dict_to_reference(model.state_dict()), expected["bn_after"], largest_slack)
    for name, tensor in expected["small_params"].items():
        close(parameters[name], tensor, what=name, slack=slack[name])
    with torch.no_grad():
        check_output(model.eval()(case.x, case.noise("eps")), expected["final_eval"], rtol=1e-9 + largest_slack)


def add_slack(slack: dict[str, float], parameters: dict[str, Tensor], rate: float) -> None:
    """A gradient that is truly zero is computed as rounding noise g, which moves its parameter by up to lr |g| / eps.

    Those gradients were seen up to 1e-17 of the model's largest gradient norm, the smallest others above 1e-8 of it.
    """
    norms = {name: parameter.grad.norm().item() for name, parameter in parameters.items()}
    largest = max(norms.values())
    for name, norm in norms.items():
        slack[name] += rate * 1e-16 * largest if norm < 1e-9 * largest else 0.0


def check_parameters(parameters: dict[str, Tensor], row: dict, slack: dict[str, float]) -> None:
    assert parameters.keys() == row["param_norm"].keys()
    for name, parameter in parameters.items():
        close(parameter.norm(), row["param_norm"][name], what=name, slack=slack[name])
        allowed = 1e-9 * parameter.abs().sum().item() + slack[name] * parameter.numel() ** 0.5
        assert abs(parameter.sum().item() - float(row["param_sum"][name])) <= allowed, name


# ---- sampling


@torch.no_grad()
def test_prior_samples(case):
    model = case.eval_model
    assert {row["temp"] for row in case.file["sample"]} == {1.0, 0.7}
    for row in case.file["sample"]:
        eps = case.noise("eps")
        outputs = model.generate(eps, row["temp"])[0]
        close(outputs, row["logits"], what=f"logits at temperature {row['temp']}")
        if "mean" in row:
            close(model.sample(eps, row["temp"]), row["mean"])
        if "u_mix" in row:
            uniforms, pixels = [row[key].to(outputs) for key in ("u_mix", "u_logistic")], model.likelihood(outputs)
            close(pixels.sample(*uniforms), row["sample_t1"])
            close(pixels.sample(*uniforms, row["temp"]), row["sample_t"])


@torch.no_grad()
def test_batch_norm_reestimation(case):
    expected, model = case.file["readjust_bn"], case.model()
    keys = expected["eps_keys"]
    readjust_batch_norm(model, lambda i: case.noise(keys[i]), len(keys), expected["temp"])
    close_buffers(state_dict_to_reference(model.state_dict()), expected["bn_after"])
    close(model.generate(case.noise("eps"), expected["temp"])[0], expected["logits_after"])
