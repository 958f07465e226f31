"""The restatement of NVAE (nvae_restatement.py) against numbers of the reference release, in float64.

The numbers are in the folder NVAE_GOLDEN_DIR.
"""

import pytest
import torch
from torch import Tensor

from tests.helpers import golden
from tests.helpers.golden import close, close_buffers
from tests.models import nvae_restatement as restatement
from tests.models import nvae_restatement_layout as layout
from tests.models import nvae_restatement_training as restated_training


@pytest.fixture(scope="module", params=golden.model_files())
def reference(request) -> dict:
    file = golden.load(request.param)
    return file | {"state_dict": golden.double(file["state_dict"]), "x": golden.reference_input(file)}


def test_reference_layout(reference):
    args, state = reference["args"], reference["state_dict"]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == layout.parameter_shapes(args)
    assert list(state) == list(layout.parameter_shapes(args))
    assert layout.parameter_order(args) == reference["param_order"]
    assert layout.groups_per_scale(args) == reference["groups_per_scale"]
    close(reference["x"].sum(), reference["x_f64_sum"])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("noise", ["eps", "zero"])
@torch.no_grad()
def test_reference_forward(reference, mode, noise):
    expected = reference[f"{mode}_{noise}"]
    net = restatement.Net(reference["args"], reference["state_dict"], training=mode == "train")
    out = restatement.forward(net, reference["x"], golden.noise(reference, noise))
    for key in ("logits", "recon", "kl_all", "kl_diag", "log_q", "log_p", "nelbo", "log_iw"):
        close(out[key], expected[key], what=key)
    for found, group in zip(out["groups"], expected.get("groups", []), strict="groups" in expected):
        for key, tensor in group.items():
            close(found[key], tensor, what=key)
    if "bn_after" in expected:
        close_buffers(net.running, expected["bn_after"])


def starting_vectors(reference: dict, key: str) -> dict[str, Tensor]:
    groups = reference["spectral"]["groups"]
    return {name: u for group in groups for name, u in zip(group["members"], group[key], strict=True)}


def test_reference_regularizers(reference):
    expected, state = reference["spectral"], reference["state_dict"]
    assert list(restated_training.conv_matrices(state).values()) == [group["members"] for group in expected["groups"]]
    loss_40, u_40, v_40 = restated_training.spectral_loss(state, starting_vectors(reference, "u0"), 40)
    loss_4, u_4, v_4 = restated_training.spectral_loss(state, starting_vectors(reference, "u0"), 4)
    close(loss_40, expected["loss_40_iters"])
    close(loss_4, expected["loss_4_iters"])
    close(restated_training.spectral_loss(state, u_40, 4)[0], expected["loss_40_then_4"])
    for key, found in {"u1": u_40, "v1": v_40, "u_4": u_4, "v_4": v_4}.items():
        for name, vector in starting_vectors(reference, key).items():
            close(found[name], vector, what=f"{key} of {name}")
    close(restated_training.bn_loss(state), reference["bn_loss"])


def test_reference_training(reference):
    """The rows of the training loss, and the three-step Adamax trajectory with its gradients."""
    for rule, alpha in reference["kl_alpha"].items():
        close(restated_training.kl_alpha(reference["args"], rule), alpha)
    for row in reference["train_loss"]["rows"]:
        net = restatement.Net(reference["args"], reference["state_dict"], training=True)
        check_row(reference, net, row, "eps", starting_vectors(reference, "u0"))
    check_trajectory(reference)


def check_row(reference: dict, net: restatement.Net, row: dict, noise: str, u: dict[str, Tensor]) -> dict:
    total_steps = reference["train_loss"]["total_iters"]
    loss = restated_training.training_loss(
        net, reference["x"], golden.noise(reference, noise), row["step"], total_steps, u
    )
    for key in (
        "kl_coeff",
        "wdn_coeff",
        "recon",
        "balanced_kl",
        "kl_group_coeffs",
        "kl_group_means",
        "norm_loss",
        "bn_loss",
    ):
        close(loss[key], row[key], what=f"{key} at step {row['step']}")
    close(loss["total"], row["total"])
    return loss


def check_trajectory(reference: dict) -> None:
    args, u = reference["args"], starting_vectors(reference, "u0")
    state, running = reference["state_dict"], {}
    slots = {name: (torch.zeros_like(state[name]),) * 2 for name in layout.parameter_order(args)}
    for t, row in enumerate(reference["adamax"]["steps"], start=1):
        net = restatement.Net(args, restated_training.with_gradient(args, state), training=True, running=running)
        loss = check_row(reference, net, row, row["eps_key"], u)
        state, u, running = {name: tensor.detach() for name, tensor in net.state.items()}, loss["u"], net.running
        for name, gradient in restated_training.gradients(net, loss["total"]).items():
            state[name], *slots[name] = restated_training.adamax_step(
                state[name], gradient, *slots[name], t, row["lr"], args["weight_decay"]
            )
            close(state[name].norm(), row["param_norm"][name], what=name)
    close_buffers(running, reference["adamax"]["bn_after"])
    for name, tensor in reference["adamax"]["small_params"].items():
        close(state[name], tensor, what=name)


@torch.no_grad()
def test_reference_samples(reference):
    args, state = reference["args"], reference["state_dict"]
    for row in reference["sample"]:
        logits = restatement.sample_logits(restatement.Net(args, state), golden.noise(reference), row["temp"])
        close(logits, row["logits"])
        if "mean" in row:
            close(restatement.decoder_mean(args, logits), row["mean"])
        if "u_mix" in row:
            uniforms = row["u_mix"].double(), row["u_logistic"].double()
            close(restatement.mixture_sample(logits, *uniforms), row["sample_t1"])
            close(restatement.mixture_sample(logits, *uniforms, row["temp"]), row["sample_t"])
    expected, net = reference["readjust_bn"], restatement.Net(args, state, training=True)
    for key in expected["eps_keys"]:
        restatement.sample_logits(net, golden.noise(reference, key), expected["temp"])
    close_buffers(net.running, expected["bn_after"])
    net.training = False
    close(restatement.sample_logits(net, golden.noise(reference), expected["temp"]), expected["logits_after"])
