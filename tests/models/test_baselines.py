"""The baselines against their restatement in plain torch (baseline_restatement.py), and their recipes."""

import pytest
import torch
from torch import nn

from pipeline.config import ConfigError
from pipeline.models.resnet_vae import SpectralConv2d
from pipeline.models.vector_vae import VectorVAE
from pipeline.recipe import build_model, load_recipe, recipe_path
from pipeline.training.objective import Objective, ObjectiveConfig
from tests.helpers.model_cases import noise_for, one_hot_conditions
from tests.models.baseline_restatement import (
    MLP,
    Conv,
    InverseAutoregressive,
    Planar,
    ResNet,
    SpectralConv,
    Tutorial,
    cross_entropy,
)

MLP_NAMES = {"fc1": "encoder", "fc3": "decoder", "fc4": "output"}
CONV_NAMES = {"conv1": "encoder.0", "conv2": "encoder.2", "conv3": "encoder.4"} | {
    "fc": "decoder_start", "deconv1": "decoder.0", "deconv2": "decoder.2", "deconv3": "output"}  # fmt: skip
BATCH_NORM_NAMES = {"conv1": "encoder.0", "conv2": "encoder.3", "conv3": "encoder.6"} | {
    "bn1": "encoder.1", "bn2": "encoder.4", "bn3": "encoder.7", "bn4": "decoder.1", "bn5": "decoder.4",
    "fc": "decoder_start", "deconv1": "decoder.0", "deconv2": "decoder.3", "deconv3": "output"}  # fmt: skip
RESNET_NAMES = {"down": "encoder", "fc": "decoder_start", "upward": "decoder", "last": "output"}
BLOCK_NAMES = {"conv0": "skip.0", "bn0": "skip.1"}
HEADS = {"mu": "posterior.mean", "logvar": "posterior.log_variance"}
FLOW_NAMES = {"into": "latent_layer", "context": "feature_layer", "steps": "to_parameters"}

GRAY, RGB, FACE = (1, 28, 28), (3, 32, 32), (3, 64, 64)
IAF = {"name": "iaf", "length": 3, "hidden": 7}
PLANAR = {"name": "planar", "length": 3}
CONV_OPTIONS = {"batch_norm": True, "activation": "leaky_relu", "width": 5, "latent_size": 7}
EIGHTH = {"stem_width": 4, "stage_widths": [8, 16, 32, 64], "latent_size": 32}
RESTATED = {
    "mlp_vae": ("mlp_vae", {}, lambda: MLP(GRAY, 400, 20), MLP_NAMES),
    "mlp_cvae": ("mlp_cvae", {}, lambda: MLP(GRAY, 400, 20, 10), MLP_NAMES),
    "cifar_cvae": ("cifar_cvae", {}, lambda: MLP(RGB, 128, 32, 10), MLP_NAMES),
    "planar": ("mlp_vae", {"flows": PLANAR}, lambda: MLP(GRAY, 400, 20, flow=Planar(20, 400, 3)), MLP_NAMES),
    "iaf": (
        "mlp_vae",
        {"flows": IAF},
        lambda: MLP(GRAY, 400, 20, flow=InverseAutoregressive(20, 400, 7, 3)),
        MLP_NAMES,
    ),
    "conv_vae": ("conv_vae", {}, lambda: Conv(FACE, 32, 128), CONV_NAMES),
    "conv options": ("conv_vae", CONV_OPTIONS, lambda: Conv(FACE, 5, 7, norm=True, leaky=True), BATCH_NORM_NAMES),
    "cifar_cvae_conv": ("cifar_cvae_conv", {}, lambda: Conv(RGB, 32, 32, 10, cross_entropy), CONV_NAMES),
    # an eighth of the widths: the restatement computes the singular values of every kernel
    "resnet_vae": ("resnet_vae", EIGHTH, lambda: ResNet(FACE, 4, (8, 16, 32, 64), 32), RESNET_NAMES),
}
"""name: (recipe, changes to its model section, the restated model, our name of each of its parts)."""


def our_name(theirs: str, names: dict[str, str]) -> str:
    """The project's name of a parameter of the restated model."""
    head, _, rest = theirs.partition(".")
    if head == "flow":
        kind, step, rest = rest.split(".")
        return f"posterior.flows.{step}.{FLOW_NAMES.get(kind, kind)}.{rest}"
    path = ".".join(BLOCK_NAMES.get(part, part) for part in rest.split("."))
    return f"{(HEADS | names).get(head, head)}.{path}"


def share_weights(ours: VectorVAE, theirs: Tutorial, names: dict[str, str]) -> dict[str, nn.Parameter]:
    """Copies our weights into the restated model. Returns our parameters by the restated names. All must be used."""
    named = dict(ours.named_parameters())
    paired = {}
    for name, parameter in theirs.named_parameters():
        own = our_name(name, names)
        own = own if own in named else own.replace(".weight", ".parametrizations.weight.original")
        own = own if own in named else own.replace("weight", "parametrizations.weight.original")
        parameter.data = named[own].data.clone()
        paired[name] = named.pop(own)
    assert not named, f"not restated: {sorted(named)}"
    return paired


def set_singular_vectors(model: nn.Module) -> None:
    """Sets the power iterations to the exact singular vectors, which further steps do not change."""
    for conv in model.modules():
        if isinstance(conv, SpectralConv2d):
            norm = conv.parametrizations.weight[0]
            u, _, vh = torch.linalg.svd(conv.parametrizations.weight.original.detach().flatten(1), full_matrices=False)
            norm._u.copy_(u[:, 0])
            norm._v.copy_(vh[0])


@pytest.mark.parametrize("case", RESTATED)
def test_a_baseline_equals_its_restatement(case):
    """Loss and every gradient, in float64, under the recipe's model, condition and objective."""
    name, changes, tutorial, names = RESTATED[case]
    recipe = load_recipe(recipe_path(name), [])
    section = type(recipe.model).model_validate({**recipe.model.model_dump(), **changes})
    torch.manual_seed(3)
    ours = build_model(recipe.model_copy(update={"model": section})).double()
    theirs = tutorial().double()
    paired = share_weights(ours, theirs, names)
    set_singular_vectors(ours)
    x, noise = torch.rand(3, *ours.image_shape, dtype=torch.float64), noise_for(ours, 3, torch.float64)
    condition = one_hot_conditions(ours, 3, torch.float64)

    objective = Objective(recipe.objective, ours.groups, total_steps=100)
    loss, _ = objective(ours(x, noise, condition), step=0)
    expected = theirs.loss(x, noise[0].flatten(1), condition) / 3
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    loss.backward()
    expected.backward()
    for own, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            paired[own].grad, parameter.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=own: f"{n}: {m}"
        )


def test_the_restated_spectral_convolution_is_the_same_function():
    """Also with a bias and stride 2."""
    conv = SpectralConv2d(3, 5, 3, stride=2, bias=True).double()
    set_singular_vectors(conv)
    plain = SpectralConv(3, 5, 3, 2, bias=True).double()
    plain.weight, plain.bias = conv.parametrizations.weight.original, conv.bias
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-12, atol=1e-12)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_vae", "mlp_cvae", "cifar_cvae", "cifar_cvae_conv", "conv_vae", "resnet_vae"])
def test_a_recipe_has_the_training_settings_of_the_tutorials_and_none_of_nvae(name):
    recipe = load_recipe(recipe_path(name), [])
    assert recipe.regularizers.strength == 0
    assert recipe.objective == ObjectiveConfig(
        beta=0.1 if name == "resnet_vae" else 1.0, schedule="constant", kl_balancing="none"
    )
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.eps) == ("adam", 1e-3, 1e-8)
    assert recipe.optim.schedule == ("step" if name == "resnet_vae" else "constant")
    assert recipe.optim.weight_decay == (1e-5 if name == "resnet_vae" else 0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mlp_vae", 784 * 400 + 400 + 2 * (400 * 20 + 20) + 20 * 400 + 400 + 400 * 784 + 784),
        ("mlp_cvae", 794 * 400 + 400 + 2 * (400 * 20 + 20) + 30 * 400 + 400 + 400 * 784 + 784),
        ("cifar_cvae", 3082 * 128 + 128 + 2 * (128 * 32 + 32) + 42 * 128 + 128 + 128 * 3072 + 3072),
    ],
)
def test_a_fully_connected_recipe_has_this_many_parameters(name, parameters):
    with torch.device("meta"):
        model = build_model(load_recipe(recipe_path(name), []))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_convolutional_recipes_have_these_widths():
    with torch.device("meta"):
        conv, resnet = (build_model(load_recipe(recipe_path(name), [])) for name in ("conv_vae", "resnet_vae"))
    widths = [(module.in_channels, module.out_channels) for module in (*conv.encoder[::2], *conv.decoder[::2])]
    assert widths == [(3, 32), (32, 64), (64, 128), (128, 64), (64, 32)]
    assert (conv.posterior.mean.in_features, conv.posterior.mean.out_features) == (8192, 128)
    stages = [block.conv1.out_channels for block in resnet.encoder]
    assert (resnet.stem.out_channels, stages) == (32, [64, 64, 128, 128, 256, 256, 512, 512])
    assert [block.conv1.in_channels for block in resnet.decoder] == stages[::-1]
    assert resnet.posterior.mean.out_features == 256


@pytest.mark.parametrize("name", ["mlp_vae", "conv_vae", "resnet_vae"])
def test_regularizers_are_refused_for_these_models(name):
    """They support plain convolutions only. The spectral norm of a spectrally normalized one is the constant 1."""
    with pytest.raises(ConfigError, match=f"regularizers.strength=0.01: .* model.name={name} needs regularizers"):
        load_recipe(recipe_path(name), ["regularizers.strength=0.01"])


def test_flows_are_set_by_an_override():
    model = build_model(load_recipe(recipe_path("mlp_vae"), ["model.flows={name: iaf, length: 4}"]))
    assert len(model.posterior.flows) == 4
