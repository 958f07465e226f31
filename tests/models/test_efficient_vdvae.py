"""Efficient-VDVAE: its settings, its initial weights, and the scales of its distributions."""

import re
import shlex

import pytest
import torch
from pydantic import ValidationError

from pipeline.models.efficient_vdvae import LN_2, EfficientVDVAE, EfficientVDVAEConfig
from pipeline.nn.distributions import LogisticScale
from pipeline.nn.latent_normals import LatentNormals
from pipeline.recipe import build_model, load_recipe, recipe_path
from pipeline.training.objective import Objective
from tests.helpers.model_cases import EFFICIENT
from tests.helpers.pages import ROOT

LEVELS = "model={name: efficient_vdvae"
SMALL = {name: tuple(value) if isinstance(value, list) else value for name, value in EFFICIENT.items()}


def config(**changes) -> EfficientVDVAEConfig:
    return EfficientVDVAEConfig(**(SMALL | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": (1, 2)}, "model.groups: 2 entries for the 4 levels of model.strides; give one for each level"),
        ({"strides": (1, 2, 4, 2)}, "model.strides: the last is 2, but nothing follows it; it must be 1"),
        ({"encoder_widths": (8, 9, 9, 9)}, "model.encoder_widths: 8 and 9 channels at levels 0 and 1; they can differ"),
        ({"decoder_widths": (8, 9, 9, 9)}, "model.decoder_widths: 8 and 9 channels at levels 0 and 1; they can differ"),
        ({"bottleneck": (0.5, 0.1, 0.5, 0.5)}, "model.bottleneck: 0.1 leaves no inner channel of the 6 at level 1; it"),
        ({"groups": (100,), "residual_blocks": 3}, "model.groups, model.encoder_blocks: more than 1,000 blocks"),
        ({"strides": (1, 100, 100, 100, 1), "bottleneck": (1.0,)}, "model.encoder_widths: 4 entries for the 5 levels"),
        ({"strides": (100, 100, 100, 1)}, "model.strides: their product is above 16,384"),
        ({"outer_kernel": 5}, "outer_kernel"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(changes, message):
    with pytest.raises(ValidationError) as error:
        config(**changes)
    assert message in str(error.value)


def test_sizes_that_the_strides_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="efficient_vdvae: image size 20 is not a multiple of 8; 16 or 24 would work"):
        EfficientVDVAE(config(), (3, 20, 20))
    with pytest.raises(ValueError, match="needs square images, got 16x24"):
        EfficientVDVAE(config(), (3, 16, 24))


def test_levels_and_groups():
    """Lists are from the images' resolution down; latent groups are sampled from the lowest level up."""
    model = EfficientVDVAE(config(), (3, 16, 16))
    assert [group.name for group in model.groups] == [
        "2x2_group00", "8x8_group00", "16x16_group00", "16x16_group01", "16x16_group02",
    ]  # fmt: skip
    assert [group.shape[0] for group in model.groups] == [3, 3, 2, 2, 2]
    assert model.decoder.feature_keys == [3, 2, 1, 1, 0]
    assert [len(level.blocks) for level in model.encoder.levels] == [1, 2, 1, 1]


def test_initial_weights():
    """Xavier uniform, with bound sqrt(6 / (fans)); times sqrt(1 / groups) at the ends of residual branches."""
    torch.manual_seed(0)
    model = EfficientVDVAE(config(), (3, 16, 16))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fans = module.weight[0].numel() + module.weight[:, 0].numel()
            is_last = "residual" in name or ".blocks." in name and name.startswith("encoder")
            small = name.endswith("project") or is_last and name.endswith("convs.3")
            bound = (6 / fans) ** 0.5 * (1 / 5) ** (0.5 if small else 0)
            assert bound * (1 - 16 / module.weight.numel()) <= module.weight.abs().max() <= bound * 1.00001, name
            assert (module.bias == 0).all()
    assert model.decoder.start.abs().max() <= (3 / 40) ** 0.5
    assert all((block.unpool.map == 0).all() for block in model.decoder.blocks if block.unpool is not None)


@pytest.mark.parametrize("rule", ["exp", "softplus"])
def test_scales_in_float32_are_those_of_float64(rule):
    """From sigmas of 1e-20 to 1e20, with gradients; 0 gives about 1."""
    raw = torch.tensor([-60.0, -5.0, 0.0, 3.0, 60.0], requires_grad=True)
    for beta in (LN_2, 0.4, 1.0):
        normals = LatentNormals(rule, beta)
        found = normals.prior(raw.view(5, 1, 1).repeat(2, 1, 1)).sigma.flatten()
        value = raw.detach().double()
        exact = torch.exp(beta * value) if rule == "exp" else torch.log1p(torch.exp(beta * value)) / beta
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
        scale = LogisticScale(rule, beta, -80.0).log_scale(raw)
        torch.testing.assert_close(scale.double(), exact.log(), rtol=1e-5, atol=1e-6)
        assert torch.autograd.grad(scale.sum(), raw)[0].isfinite().all()
    tiny = torch.tensor([-200.0, -1e4], requires_grad=True)  # their softplus is 0 in float32
    scale = LogisticScale(rule, LN_2, -7.0).log_scale(tiny)
    assert torch.equal(scale, torch.full((2,), -7.0 * (LN_2 if rule == "exp" else 1)))
    assert torch.equal(torch.autograd.grad(scale.sum(), tiny)[0], torch.zeros(2))
    assert LogisticScale("softplus", LN_2, -2.0).log_scale(raw).min() == -2
    assert LogisticScale("exp", 0.5, -2.0).log_scale(raw).min() == -1  # the minimum applies before beta


def test_a_residual_posterior_of_zeros_scales_the_prior():
    """Its means are the prior's. Its sigma is the prior's times that of an output of 0: 1, or softplus(0)."""
    raw_prior, zeros = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.zeros(3, 4, 2, 2, dtype=torch.float64)
    for rule, beta, factor in (("exp", 0.7, 1.0), ("softplus", LN_2, 1.0), ("softplus", 1.0, 0.6931471805599453)):
        normals = LatentNormals(rule, beta, residual=True)
        posterior, prior = normals.posterior(zeros, raw_prior), normals.prior(raw_prior)
        assert torch.equal(posterior.mean, prior.mean)
        torch.testing.assert_close(posterior.sigma, factor * prior.sigma, rtol=1e-7, atol=0)


def test_the_command_of_the_page_has_the_published_levels_and_schedules():
    """CIFAR-10: 33 levels with 47 groups. The KL's weight is clamp((step - 21) / 5021, 1e-4, 1) for steps counted from
    1, and groups are weighted by their KL up to step 10,000.
    """
    command = next(
        text for text in re.findall(r"```\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.S) if LEVELS in text
    )
    words = [word for word in shlex.split(command) if "=" in word]
    recipe = load_recipe(recipe_path("vdvae_cifar10"), words)
    levels = recipe.model.levels(32)
    assert [sum(level.resolution == r for level in levels) for r in (32, 16, 8, 4, 1)] == [12, 7, 7, 4, 3]
    second = {level.resolution: above for level, above in zip(levels[1:], levels, strict=False) if level.stride > 1}
    assert {r: level.groups for r, level in second.items()} == {32: 11, 16: 5, 8: 1, 4: 1}
    with torch.device("meta"):
        groups = build_model(recipe).groups
    assert len(groups) == 47
    objective = Objective(recipe.objective, groups, recipe.train.steps)
    for step in (1, 21, 22, 1000, 5041, 5042, 700_000):
        expected = min(max((step - 21) / 5021, 1e-4), 1)
        assert objective.beta(step - 1) == pytest.approx(expected, rel=1e-9)
    assert [objective.balances(step - 1) for step in (1, 10_000, 10_001)] == [True, True, False]
