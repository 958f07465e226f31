"""Efficient-VDVAE against its restatement (efficient_vdvae_restatement.py), in float64; and the restatement against
numbers of the reference release.
"""

from math import prod
from typing import Any

import pytest
import torch

from pipeline.models.efficient_vdvae import EfficientVDVAE
from tests.helpers import golden
from tests.helpers.efficient_vdvae_cases import config_from_release, name_from_release
from tests.helpers.golden import close
from tests.models import efficient_vdvae_restatement as restated

BASE = {
    "use_1x1_conv": True,
    "use_residual_distribution": False,
    "distribution_base": "std",
    "output_distribution_base": "std",
    "gradient_smoothing_beta": 0.6931472,
    "output_gradient_smoothing_beta": 0.6931472,
    "input_conv_filters": 5,
    "up_strides": [2, 1, 3, 1],
    "up_n_blocks_per_res": [1, 0, 0, 1],
    "up_n_blocks": [1] * 4,
    "up_n_layers": [2] * 4,
    "up_filters": [7, 7, 9, 9],
    "up_mid_filters_ratio": [0.5, 0.5, 0.3, 1.0],
    "up_kernel_size": [3, 3, 3, 1],
    "up_skip_filters": [6, 8, 8, 10],
    "down_strides": [1, 3, 1, 2],
    "down_n_blocks_per_res": [1, 0, 2, 0],
    "down_n_blocks": [1] * 4,
    "down_n_layers": [2] * 4,
    "down_filters": [10, 8, 8, 6],
    "down_mid_filters_ratio": [1.0, 0.3, 0.5, 0.5],
    "down_kernel_size": [1, 3, 3, 3],
    "down_latent_variates": [4, 3, 3, 2],
    "num_output_mixtures": 2,
    "min_mol_logscale": -7.0,
    "num_bits": 8.0,
    "target_res": 6,
}
CASES: dict[str, dict[str, Any]] = {
    "softplus": {},
    "softplus, residual, 5 bits": {"use_residual_distribution": True, "num_bits": 5.0, "gradient_smoothing_beta": 0.4},
    "logarithms, residual": {
        "use_residual_distribution": True,
        "distribution_base": "logstd",
        "output_distribution_base": "logstd",
        "gradient_smoothing_beta": 0.5,
        "min_mol_logscale": -0.2,
    },
    "3x3 everywhere, two residual blocks": {"use_1x1_conv": False, "up_n_blocks": [2] * 4, "down_n_blocks": [2] * 4},
    "no level of one pixel": {"target_res": 12, "up_kernel_size": [3] * 4, "down_kernel_size": [3] * 4},
}


class Case:
    """A model and the same weights under the release's names; images and noise."""

    def __init__(self, name: str):
        self.args = BASE | CASES[name]
        generator = torch.Generator().manual_seed(len(name))
        size = self.args["target_res"]
        self.model = EfficientVDVAE(config_from_release(self.args), (3, size, size)).double()
        self.weights = {}
        for key, shape in restated.shapes_of(self.args).items():
            spread = 1 / max(4, prod(shape[1:]) ** 0.5)
            self.weights[key] = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.model.load_state_dict({self.ours(key): value for key, value in self.weights.items()})
        self.pixels = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
        self.pixels.view(-1)[:6] = torch.tensor([0, 255, 254, 1, 7, 248], dtype=torch.uint8)
        self.eps = [
            torch.randn(3, *shape, generator=generator, dtype=torch.float64)
            for shape in restated.latent_shapes(self.args)
        ]

    def ours(self, name: str) -> str:
        return name_from_release(name, self.args)


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(request.param)


def test_bound_and_gradients(case):
    leaves = {name: value.clone().requires_grad_() for name, value in case.weights.items()}
    expected = restated.forward((case.args, leaves), case.pixels, case.eps)
    out = case.model(case.pixels.double() / 255, case.eps)
    close(-out.log_px, expected["recon"], what="recon")
    close(out.kl.T, expected["kl_all"], what="kl")
    close(out.log_qz, expected["log_q"])
    close(out.log_pz, expected["log_p"])
    expected["nelbo"].mean().backward()
    (-out.elbo.mean()).backward()
    parameters = dict(case.model.named_parameters())
    assert len(parameters) == len(leaves)
    for name, leaf in leaves.items():
        close(parameters[case.ours(name)].grad, leaf.grad, what=name, slack=1e-9 * leaf.grad.abs().max().item())


@torch.no_grad()
def test_samples(case):
    temperatures = [0.5 + 0.1 * k for k in range(len(case.eps))]
    outputs, _ = case.model.generate(case.eps, temperatures)
    logits = restated.sample_prior((case.args, case.weights), case.eps, temperatures)
    close(outputs, logits)
    size = case.args["target_res"]
    uniforms = [torch.rand(3, channels, size, size, dtype=torch.float64) for channels in (2, 3)]
    image = case.model.likelihood(outputs).sample(*uniforms)
    close(2 * image - 1, restated.sample_image(case.args, logits, *uniforms))


@pytest.mark.parametrize("variant", ["std", "logstd_residual", "std_residual_k3"])
@torch.no_grad()
def test_the_restatement_has_the_numbers_of_the_release(variant):
    if golden.golden_folder() is None:
        pytest.skip("NVAE_GOLDEN_DIR is not set")
    file = golden.load(golden.golden_folder() / "vdvae" / "vdvae_efficient.pt")[variant]
    args, weights = file["args"], golden.double(file["state_dict"])
    assert restated.shapes_of(args) == {name: tuple(value.shape) for name, value in weights.items()}
    out, dimensions = restated.forward((args, weights), file["x_uint8"], golden.noise(file)), file["x"][0].numel()
    close(restated.pixels_to_values(args, file["x_uint8"]), file["x"])
    close(out["logits"], file["logits"])
    close(out["recon"].mean() / dimensions, file["recon_per_dim"])
    close(out["kl_all"].mean(1) / dimensions, file["kl_per_dim"])
    expected = file["sample"]
    temperatures = [t for i, t in enumerate(expected["temps"]) for _ in restated.block_names(args, i)]
    logits = restated.sample_prior((args, weights), golden.noise(file), temperatures)
    close(logits, expected["logits"])
    uniforms = expected["u_mix"].double(), expected["u_logistic"].double()
    image = restated.sample_image(args, logits, *uniforms, expected["output_temperature"])
    close(image, expected["sample"])
