"""The restatement of VDVAE against numbers of its reference release: what the model is compared with in every clone."""

from math import log

import pytest
import torch

from tests.helpers import golden
from tests.helpers.golden import close
from tests.helpers.vdvae_cases import golden_file
from tests.models import vdvae_restatement as restated
from tests.models.vdvae_restatement_training import Training

SCALARS = ("elbo", "distortion", "rate", "grad_norm", "lr")


@pytest.fixture(scope="module", params=[golden_file("vdvae_small"), golden_file("vdvae_deep")])
def file(request) -> dict:
    return golden.load(request.param)


def net_of(file: dict) -> restated.Net:
    return file["args"], golden.double(file["state_dict"])


def test_names_shapes_and_initial_weights(file):
    shapes = {name: tuple(value.shape) for name, value in file["state_dict"].items()}
    assert list(restated.shapes_of(file["args"]).items()) == list(shapes.items())
    assert [list(shape) for shape in restated.group_shapes(file["args"])] == file["groups"]
    bounds = restated.initial_bounds(file["args"])
    assert bounds == pytest.approx(file["init"], rel=1e-6)  # stored from float32


@torch.no_grad()
def test_forward(file):
    net = net_of(file)
    close(restated.network_input(file["args"], file["x_uint8"]), file["x_input"])
    close(restated.target(file["args"], file["x_uint8"]), file["x_target"])
    for noise in ("eps", "zero"):
        expected = file[f"eval_{noise}"]
        found = restated.forward(net, file["x_uint8"], golden.noise(file, noise))
        for name in expected.keys() - {"activations", "groups", "loss"}:
            close(found[name], expected[name], what=name)
        for resolution, feature in expected.get("activations", {}).items():
            close(found["activations"][resolution], feature)
        for group, wanted in zip(found["groups"], expected.get("groups", []), strict="groups" in expected):
            for name, value in wanted.items():
                close(group[name], value, what=name)
        close(found["elbo"], expected["loss"]["elbo"])


@torch.no_grad()
def test_importance_weights(file):
    found = [
        restated.forward(net_of(file), file["x_uint8"], golden.noise(file, key)) for key in ("eps", "eps2", "eps3")
    ]
    log_iw = torch.stack([out["log_iw"] for out in found], dim=1)
    close(log_iw, file["iw"]["log_iw"])
    close(-(log_iw.logsumexp(1) - log(3)).mean(), file["iw"]["neg_log_p"])


@torch.no_grad()
def test_samples(file):
    net, given = net_of(file), file["partial"]["num_given"]
    groups = restated.forward(net, file["x_uint8"], golden.noise(file))["groups"]
    prefix = [group["z"] for group in groups[:given]]
    rows = [(row, "eps", []) for row in file["sample"]] + [(file["partial"], "eps2", prefix)]
    for row, noise, latents in rows:
        px_z, logits = restated.sample_prior(net, golden.noise(file, noise), row["temp"], latents)
        close(px_z, row["px_z"])
        close(logits, row["logits"])
        image = restated.sample_image(logits, row["u_mix"].double(), row["u_logistic"].double())
        close(image, row["sample"])
        assert torch.equal(restated.to_bytes(image), row["sample_uint8"])


def test_gradients_and_training(file):
    """Seven steps, of which two are skipped. The gradients are those of the first."""
    expected = file["training"]
    args, weights = net_of(file)
    training = Training(args, weights, expected)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    restated.forward((args, leaves), file["x_uint8"], golden.noise(file))["elbo"].backward()
    for name, gradient in file["grads"].items():
        close(leaves[name].grad, gradient, what=name)
    for row in expected["steps"]:
        eps = [row.get("eps_scale", 1.0) * value for value in golden.noise(file, row["eps_key"])]
        if row.get("eps_nan"):
            eps[0].view(-1)[0] = float("nan")
        found = training.step(file["x_uint8"], eps)
        assert found["skipped"] == row["skipped"]
        for name in SCALARS:
            assert found[name] == pytest.approx(row[name], rel=1e-9, nan_ok=True), name
        for kind, values in (("param", training.weights), ("ema", training.average)):
            close(torch.stack([values[name].norm() for name in file["param_order"]]), row[f"{kind}_norm"])
    for kind, values in (("params", training.weights), ("ema_params", training.average)):
        for name, value in expected[kind].items():
            close(values[name], value, what=name, slack=1e-9 * value.abs().max().item())
