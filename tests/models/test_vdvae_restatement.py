"""VDVAE against its restatement (vdvae_restatement.py), in float64, for architectures with each of its options."""

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models.vdvae import VDVAE
from pipeline.models.vdvae_conversion import config_from_reference, name_from_reference
from tests.helpers.golden import close
from tests.models import vdvae_restatement as restated

BASE = {
    "dataset": "cifar10",
    "enc_blocks": "8x2,8d2,4x1,4d4,1x2",
    "dec_blocks": "1x1,4m1,4x1,8m4,8x2",
    "width": 12,
    "custom_width_str": "",
    "bottleneck_multiple": 0.25,
    "zdim": 3,
    "no_bias_above": 64,
    "num_mixtures": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "one width": {},
    "wider at low resolutions": {
        "enc_blocks": "16x1,16d2,8x1,8d2,4x1,4d2,2x1,2d2,1x1",
        "dec_blocks": "1x2,2m1,4m2,4,8m4,16m8,16x1",
        "custom_width_str": "8:14,4:16,2:16,1:20",
        "bottleneck_multiple": 0.4,  # does not divide a width
    },
    "no learned start": {"no_bias_above": 0, "bottleneck_multiple": 1.5},
    "some learned starts, unused features": {
        "no_bias_above": 4,
        "enc_blocks": "8x1,8d2,4x1,4d2,2d2,1x1",
        "dec_blocks": "1x2,8m1,8x1",
    },
    "back at a low resolution": {"dec_blocks": "1x1,4m1,1x1,4m1,8m4,4m1,8m4"},
    "a factor of three": {"enc_blocks": "12x1,12d3,4x1,4d2,2x1", "dec_blocks": "2x1,4m2,12m4,12x1"},
    "5 bits": {"dataset": "ffhq_256", "num_mixtures": 1},
    "other pixels": {"dataset": "imagenet64", "zdim": 1},
    "one block": {"enc_blocks": "4", "dec_blocks": "4"},
}


class Case:
    """A model and the same weights under the release's names, away from their initial values; images and noise."""

    def __init__(self, name: str, condition_size: int = 0):
        self.args = BASE | CASES[name]
        generator = torch.Generator().manual_seed(len(name))
        size = restated.blocks_of(self.args["enc_blocks"])[0][0]
        self.model = VDVAE(config_from_reference(self.args), (3, size, size), condition_size=condition_size).double()
        self.weights = {}
        for key, shape in restated.shapes_of(self.args).items():
            spread = 1 / max(4, prod(shape[1:]) ** 0.5)
            self.weights[key] = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        state = {name_from_reference(key): value for key, value in self.weights.items()}
        self.model.load_state_dict(state, strict=condition_size == 0)
        self.pixels = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
        self.pixels.view(-1)[:6] = torch.tensor([0, 255, 254, 1, 7, 248], dtype=torch.uint8)
        shapes = restated.group_shapes(self.args)
        self.eps, self.other_eps = (
            [torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)
        )

    @property
    def x(self) -> Tensor:
        return self.pixels.double() / 255

    @property
    def net(self) -> restated.Net:
        return self.args, self.weights


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(request.param)


def test_names_shapes_and_groups(case):
    shapes = {name: tuple(value.shape) for name, value in case.model.named_parameters()}
    expected = {name_from_reference(name): shape for name, shape in restated.shapes_of(case.args).items()}
    assert list(shapes.items()) == list(expected.items())
    assert [group.shape for group in case.model.groups] == restated.group_shapes(case.args)


def test_initial_weights(case):
    """Uniform between the bounds: the largest value of many is near the bound, and the standard deviation as well."""
    torch.manual_seed(2)
    model = VDVAE(case.model.config, case.model.image_shape)
    parameters = dict(model.named_parameters())
    for name, bound in restated.initial_bounds(case.args).items():
        value = parameters[name_from_reference(name)].detach()
        if bound == 0 or name == "decoder.gain":
            assert (value == bound).all(), name
        else:
            assert bound * (1 - 16 / value.numel()) <= value.abs().max() <= bound * (1 + 1e-6), name
            torch.testing.assert_close(value.std(), torch.tensor(bound / 3**0.5), rtol=3 / value.numel() ** 0.5, atol=0)


@torch.no_grad()
def test_bound(case):
    out = case.model(case.x, case.eps)
    expected = restated.forward(case.net, case.pixels, case.eps)
    close(-out.log_px, expected["recon"], what="recon")
    close(out.kl.T, expected["kl_all"], what="kl")
    close(torch.stack(out.kl_units), expected["kl_diag"], what="kl of channels")
    close(out.log_qz, expected["log_q"])
    close(out.log_pz, expected["log_p"])
    for found, group in zip(case.model.encode(case.x, case.eps), expected["groups"], strict=True):
        close(found, group["z"])


def test_gradients(case):
    model = case.model
    (-model(case.x, case.eps).elbo.mean() / model.num_dimensions).backward()
    leaves = {name: value.clone().requires_grad_() for name, value in case.weights.items()}
    restated.forward((case.args, leaves), case.pixels, case.eps)["elbo"].backward()
    parameters = dict(model.named_parameters())
    for name, leaf in leaves.items():
        found = parameters[name_from_reference(name)].grad
        close(found, leaf.grad, what=name, slack=1e-9 * leaf.grad.abs().max().item())


@torch.no_grad()
def test_samples(case):
    """At one temperature, at one for each block, and continued from the posterior."""
    model, blocks = case.model, len(case.eps)
    given = model.encode(case.x, case.eps)[: blocks // 2]
    several = [0.5 + 0.1 * k for k in range(blocks)]
    for temperature, latents in ((1.0, []), (0.7, []), (several, []), (0.1, given)):
        outputs, _ = model.generate(case.other_eps, temperature, given=latents)
        _, logits = restated.sample_prior(case.net, case.other_eps, temperature, latents)
        close(outputs, logits)
    uniforms = [0.01 + 0.98 * torch.rand(3, channels, *outputs.shape[2:], dtype=torch.float64)
                for channels in (case.args["num_mixtures"], 3)]  # fmt: skip
    image = model.likelihood(outputs).sample(*uniforms)
    close(2 * image - 1, restated.sample_image(logits, *uniforms))


@torch.no_grad()
def test_a_condition_is_an_offset_of_the_start_and_of_every_prior():
    """The model under a condition is the unconditional one with other biases and another start tensor."""
    case = Case("wider at low resolutions", condition_size=4)
    conditioning = case.model.conditioning
    assert all((embedding.weight == 0).all() for embedding in (conditioning.start, *conditioning.priors))
    for embedding in (conditioning.start, *conditioning.priors):
        embedding.weight.normal_(std=0.3)
    condition = torch.tensor([[0.0, 1.0, 0.0, 0.5]], dtype=torch.float64).expand(3, -1)
    out = case.model(case.x, case.eps, condition)
    outputs, _ = case.model.generate(case.eps, 0.7, condition)
    case.weights["decoder.bias_xs.0"] += conditioning.start(condition[:1])[:, :, None, None]
    for k, embedding in enumerate(conditioning.priors):
        case.weights[f"decoder.dec_blocks.{k}.prior.c4.bias"][: 2 * case.args["zdim"]] += embedding(condition[0])
    expected = restated.forward(case.net, case.pixels, case.eps)
    close(-out.elbo, expected["nelbo"])
    close(out.kl.T, expected["kl_all"])
    close(outputs, restated.sample_prior(case.net, case.eps, 0.7)[1])
