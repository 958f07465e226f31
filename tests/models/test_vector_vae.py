"""The models with one latent vector: equal to the tutorials' in plain torch, and what each option must keep."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.models.base import evaluating
from pipeline.models.conditions import ClassCondition
from pipeline.models.conv_vae import ConvVAEConfig
from pipeline.models.mlp_vae import MLPVAEConfig
from pipeline.models.resnet_vae import ResNetVAEConfig, SpectralConv2d
from pipeline.models.vector_vae import VectorVAE, VectorVAEConfig
from pipeline.recipe import build_model, load_recipe, recipe_path
from pipeline.training.ema import EMA
from pipeline.training.objective import Objective, ObjectiveConfig
from pipeline.training.state import TrainingState
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

CLASSES = ClassCondition(num_classes=10)
MLP_NAMES = {"fc1": "encoder", "fc3": "decoder", "fc4": "output"}
CONV_NAMES = {"conv1": "encoder.0", "conv2": "encoder.2", "conv3": "encoder.4"} | {
    "fc": "decoder_start", "deconv1": "decoder.0", "deconv2": "decoder.2", "deconv3": "output"}  # fmt: skip
NORMED_NAMES = {"conv1": "encoder.0", "conv2": "encoder.3", "conv3": "encoder.6"} | {
    "bn1": "encoder.1", "bn2": "encoder.4", "bn3": "encoder.7", "bn4": "decoder.1", "bn5": "decoder.4",
    "fc": "decoder_start", "deconv1": "decoder.0", "deconv2": "decoder.3", "deconv3": "output"}  # fmt: skip
RESNET_NAMES = {"down": "encoder", "fc": "decoder_start", "upward": "decoder", "last": "output"}
BLOCK_NAMES = {"conv0": "skip.0", "bn0": "skip.1"}
HEADS = {"mu": "posterior.mean", "logvar": "posterior.log_variance"}
FLOW_NAMES = {"into": "latent_layer", "context": "feature_layer", "steps": "to_parameters"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_for(model: VectorVAE, count: int, seed: int = 1) -> list[Tensor]:
    shape = (count, *model.groups[0].shape)
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)]


def one_hot(count: int) -> Tensor:
    return torch.eye(10, dtype=torch.float64)[torch.arange(count) * 3 % 10]


def build(config: VectorVAEConfig, shape: tuple[int, int, int], condition=None, border: int = 0) -> VectorVAE:
    torch.manual_seed(0)
    return config.build(shape, border, 8, condition).double()


# ---- against the tutorials' models in plain torch --------------------------------------------------------------------

GREY, RGB, FACE, TINY = (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 16, 16)
IAF = {"name": "iaf", "length": 3, "hidden": 7}
PLANAR = {"name": "planar", "length": 3}
CONV_OPTIONS = {"batch_norm": True, "activation": "leaky_relu", "width": 5, "latent_size": 7}
EIGHTH = {"stem_width": 4, "stage_widths": [8, 16, 32, 64], "latent_size": 32}
SMALL_RESNET = {"stem_width": 3, "stage_widths": [4, 6], "latent_size": 5}
RESTATED = {
    "mlp_vae": ("mlp_vae", {}, lambda: MLP(GREY, 400, 20), MLP_NAMES),
    "mlp_cvae": ("mlp_cvae", {}, lambda: MLP(GREY, 400, 20, 10), MLP_NAMES),
    "cifar_cvae": ("cifar_cvae", {}, lambda: MLP(RGB, 128, 32, 10), MLP_NAMES),
    "planar": ("mlp_vae", {"flows": PLANAR}, lambda: MLP(GREY, 400, 20, flow=Planar(20, 400, 3)), MLP_NAMES),
    "iaf": (
        "mlp_vae",
        {"flows": IAF},
        lambda: MLP(GREY, 400, 20, flow=InverseAutoregressive(20, 400, 7, 3)),
        MLP_NAMES,
    ),
    "conv_vae": ("conv_vae", {}, lambda: Conv(FACE, 32, 128), CONV_NAMES),
    "conv options": ("conv_vae", CONV_OPTIONS, lambda: Conv(FACE, 5, 7, norm=True, leaky=True), NORMED_NAMES),
    "cifar_cvae_conv": ("cifar_cvae_conv", {}, lambda: Conv(RGB, 32, 32, 10, cross_entropy), CONV_NAMES),
    # an eighth of the table's widths: the restatement takes the singular values of every kernel
    "resnet_vae": ("resnet_vae", EIGHTH, lambda: ResNet(FACE, 4, (8, 16, 32, 64), 32), RESNET_NAMES),
}
"""name: (recipe, changes to its model section, the tutorial's model, our name for each of its parts)."""


def our_name(theirs: str, names: dict[str, str]) -> str:
    """The project's name of a tutorial model's parameter."""
    head, _, rest = theirs.partition(".")
    if head == "flow":
        kind, step, rest = rest.split(".")
        return f"posterior.flows.{step}.{FLOW_NAMES.get(kind, kind)}.{rest}"
    path = ".".join(BLOCK_NAMES.get(part, part) for part in rest.split("."))
    return f"{(HEADS | names).get(head, head)}.{path}"


def share_weights(ours: VectorVAE, theirs: Tutorial, names: dict[str, str]) -> dict[str, nn.Parameter]:
    """Copies our weights into theirs; our parameters by their names. Every one of ours must have been used."""
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


def settle_power_iterations(model: nn.Module) -> None:
    """The exact singular vectors, which further power iterations keep."""
    for conv in model.modules():
        if isinstance(conv, SpectralConv2d):
            norm = conv.parametrizations.weight[0]
            u, _, vh = torch.linalg.svd(conv.parametrizations.weight.original.detach().flatten(1), full_matrices=False)
            norm._u.copy_(u[:, 0])
            norm._v.copy_(vh[0])


@pytest.mark.parametrize("case", RESTATED)
def test_a_baseline_equals_its_restatement(case):
    """Loss and every gradient, in float64, under the shipped recipe's model, condition and objective."""
    name, changes, tutorial, names = RESTATED[case]
    recipe = load_recipe(recipe_path(name), [])
    section = type(recipe.model).model_validate({**recipe.model.model_dump(), **changes})
    torch.manual_seed(3)
    ours = build_model(recipe.model_copy(update={"model": section})).double()
    theirs = tutorial().double()
    paired = share_weights(ours, theirs, names)
    settle_power_iterations(ours)
    x, noise = random(3, *ours.image_shape), noise_for(ours, 3)
    condition = one_hot(3) if recipe.condition else None

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


# ---- every model and option ------------------------------------------------------------------------------------------

OPTIONS = {
    "mlp": MLPVAEConfig(hidden=8, latent_size=3),
    "mlp planar": MLPVAEConfig(hidden=8, latent_size=3, flows=PLANAR),
    "mlp iaf": MLPVAEConfig(hidden=8, latent_size=3, flows=IAF),
    "conv": ConvVAEConfig(width=2, latent_size=3),
    "conv options": ConvVAEConfig(width=2, latent_size=3, batch_norm=True, activation="leaky_relu", flows=IAF),
    "resnet": ResNetVAEConfig(**SMALL_RESNET),
    "resnet planar": ResNetVAEConfig(**SMALL_RESNET, num_blocks=1, flows=PLANAR),
}
LIKELIHOODS = [
    {"name": "bernoulli"},
    {"name": "normal"},
    {"name": "normal", "sigma": 0.1},
    {"name": "squared_error", "output": "sigmoid"},
    {"name": "squared_error", "output": "tanh"},
    {"name": "discretized_logistic"},
    {"name": "logistic_mixture", "num_components": 2, "bin_rule": "exact"},
]


@pytest.fixture(params=OPTIONS)
def option(request) -> VectorVAEConfig:
    return OPTIONS[request.param]


@pytest.mark.parametrize("condition", [None, CLASSES], ids=["plain", "by class"])
def test_every_part_of_a_model_has_its_shape_and_learns(option, condition):
    model = build(option, TINY, condition)
    x, noise, told = random(4, *TINY), noise_for(model, 4), one_hot(4) if condition else None
    out = model(x, noise, told)
    assert out.log_px.shape == out.log_qz.shape == out.log_pz.shape == (4,)
    assert out.kl.shape == (4, 1)
    assert not out.penalties
    torch.testing.assert_close(out.kl_units[0].sum(), out.kl.sum(1).mean())
    (-out.elbo.mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    for images in (model.sample(noise, 0.7, told), model.reconstruct(x, noise, told)):
        assert images.shape == x.shape
        assert 0 <= images.min() <= images.max() <= 1


def test_a_bound_goes_on_from_features(option):
    model = build(option, TINY, CLASSES).eval()
    x, told = random(4, *TINY), one_hot(4)
    features = model.features(x, told)
    for seed in (1, 2):
        noise = noise_for(model, 4, seed)
        whole, split = model(x, noise, told), model.bound(x, features, noise, told)
        torch.testing.assert_close(split.elbo, whole.elbo, rtol=0, atol=0)


def test_what_is_encoded_is_what_the_bound_decodes(option):
    """log p(z) of the output belongs to the latents that `encode` gives, and `decode` of them is the reconstruction."""
    model = build(option, TINY, CLASSES).eval()
    x, noise, told = random(4, *TINY), noise_for(model, 4), one_hot(4)
    (z,) = model.encode(x, noise, told)
    assert z.shape == (4, *model.groups[0].shape)
    log_pz = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(model(x, noise, told).log_pz, log_pz)
    torch.testing.assert_close(model.decode([z], told), model.reconstruct(x, noise, told), rtol=0, atol=0)


def test_temperature_scales_the_prior_and_the_condition_is_heard(option):
    model = build(option, TINY, CLASSES).eval()
    noise, told = noise_for(model, 4), one_hot(4)
    torch.testing.assert_close(model.sample(noise, 0.5, told), model.decode([noise[0] / 2], told), rtol=0, atol=0)
    assert not torch.equal(model.sample(noise, 1.0, told), model.sample(noise, 1.0, told.roll(1, dims=1)))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda section: "-".join(map(str, section.values())))
def test_every_likelihood_serves_every_model(option, likelihood):
    config = type(option).model_validate({**option.model_dump(), "likelihood": likelihood})
    model = build(config, TINY)
    levels = torch.randint(0, 256, (4, *TINY), generator=torch.Generator().manual_seed(5))
    out = model(levels.double() / 255, noise_for(model, 4))
    (-out.elbo.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    images = model.sample(noise_for(model, 4))
    assert images.shape == (4, *TINY)
    assert 0 <= images.min() <= images.max() <= 1


def test_the_border_is_seen_and_not_counted(option):
    model = build(option, TINY, border=2).eval()
    assert model.num_dimensions == 3 * 12 * 12
    x, noise = random(4, *TINY), noise_for(model, 4)
    other = x.clone()
    other[:, :, :2] = 1 - other[:, :, :2]
    features = model.features(x)
    inside = model.bound(x, features, noise).log_px
    torch.testing.assert_close(model.bound(other, features, noise).log_px, inside, rtol=0, atol=0)
    assert not torch.equal(model.features(other), features)
    raw = model._decode(model.encode(x, noise)[0].flatten(1), None)[:, :, 2:-2, 2:-2]
    expected = model.likelihood(raw).log_prob(x[:, :, 2:-2, 2:-2]).flatten(1).sum(1)
    torch.testing.assert_close(inside, expected)


def test_memory_format_does_not_matter(option):
    model = build(option, TINY).eval()
    x, noise = random(4, *TINY), noise_for(model, 4)
    expected = model(x, noise).elbo
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last), noise).elbo, expected)


def test_mixed_precision_keeps_densities_in_float32(option):
    model = build(option, TINY, CLASSES).float()
    x, noise, told = random(4, *TINY).float(), noise_for(model, 4)[0].float(), one_hot(4).float()
    expected = copy.deepcopy(model)(x, [noise], told).elbo
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, [noise], told)
    assert {out.log_px.dtype, out.kl.dtype, out.log_qz.dtype, out.log_pz.dtype} == {torch.float32}
    (-out.elbo.mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(out.elbo, expected, rtol=0.05, atol=1.0)


@pytest.mark.parametrize("given_condition", [None, torch.zeros(4, 3, dtype=torch.float64)])
def test_a_condition_that_does_not_fit_is_refused(option, given_condition):
    model = build(option, TINY, CLASSES)
    noise = noise_for(model, 4)
    for call in (partial(model, random(4, *TINY)), model.sample, partial(model.encode, random(4, *TINY))):
        with pytest.raises(ValueError, match="condition of 10 columns"):
            call(noise, condition=given_condition)


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (ConvVAEConfig(), 28, "conv_vae: image size 28 is not a multiple of 8; 24 or 32 would work: pad"),
        (ConvVAEConfig(), 4, "conv_vae: image size 4 is not a multiple of 8; 8 would work"),
        (ResNetVAEConfig(), 40, "resnet_vae: image size 40 is not a multiple of 16; 32 or 48 would work"),
    ],
)
def test_sizes_that_cannot_be_halved_are_refused_with_those_that_can(config, size, message):
    with pytest.raises(ValueError, match=message):
        config.build((3, size, size), 0, 8)


@pytest.mark.parametrize("config", [OPTIONS["conv"], OPTIONS["resnet"]])
@pytest.mark.parametrize("size", [(8, 24), (32, 16)])
def test_images_need_not_be_square(config, size):
    model = build(config, (3, *size))
    x, noise = random(2, 3, *size), noise_for(model, 2)
    assert model.reconstruct(x, noise).shape == x.shape


# ---- spectral normalisation ------------------------------------------------------------------------------------------


def trained_a_little(model: VectorVAE, passes: int = 30) -> VectorVAE:
    with torch.no_grad():
        for seed in range(passes):
            model(random(4, *TINY, seed=seed), noise_for(model, 4, seed))
    return model


def test_every_convolution_is_held_to_spectral_norm_one():
    model = trained_a_little(build(OPTIONS["resnet"], TINY), 100).eval()
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 2 + 2 * (2 * 2 * 2) + 2 * 2  # stem and output; two in each block; a skip in every second
    for conv in convs:
        assert torch.linalg.matrix_norm(conv.current_weight().flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_averaged_weights_keep_their_spectral_norm():
    """An average of unit vectors is shorter than 1, which alone would make the norm larger."""
    model = trained_a_little(build(OPTIONS["resnet"], TINY), 20)
    average = EMA(model, 0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for seed in range(40):
        (-model(random(4, *TINY, seed=seed), noise_for(model, 4, seed)).elbo.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, seed)
    with average.applied(model), evaluating(model), torch.no_grad():
        convs = [module for module in model.modules() if isinstance(module, SpectralConv2d)]
        norms = [torch.linalg.matrix_norm(conv.current_weight().flatten(1), 2).item() for conv in convs]
        uncorrected = [torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() for conv in convs]
    assert max(norms) < 1.01
    assert max(uncorrected) > max(norms) + 0.005


def test_the_restated_convolution_is_the_same_function():
    """Also of one with a bias at stride 2: SpectralConv is what the restatement stands on."""
    conv = SpectralConv2d(3, 5, 3, stride=2, bias=True).double()
    settle_power_iterations(conv)
    plain = SpectralConv(3, 5, 3, 2, bias=True).double()
    plain.weight, plain.bias = conv.parametrizations.weight.original, conv.bias
    x = random(2, 3, 8, 8)
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-12, atol=1e-12)


def test_evaluation_leaves_the_power_iteration_alone_and_a_skipped_step_puts_it_back():
    model = trained_a_little(build(OPTIONS["resnet"], TINY), 1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert sum("_u" in name for name in before) == 22
    with evaluating(model):
        model(random(4, *TINY), noise_for(model, 4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

    state = TrainingState(model, None, NoRegularizers(), None)
    state.remember_buffers()
    trained_a_little(model, 2)
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    assert len([name for name in moved if "_u" in name]) > 10
    state.undo_forward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class NoRegularizers:
    def discard(self) -> None:
        """Nothing is kept."""


def test_a_state_dict_holds_the_power_iteration():
    model = trained_a_little(build(OPTIONS["resnet"], TINY), 3)
    other = OPTIONS["resnet"].build(TINY, 0, 8).double()
    other.load_state_dict(model.state_dict())
    x, noise = random(4, *TINY), noise_for(model, 4)
    for _ in range(2):
        assert torch.equal(model(x, noise).elbo, other(x, noise).elbo)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_vae", "mlp_cvae", "cifar_cvae", "cifar_cvae_conv", "conv_vae", "resnet_vae"])
def test_a_recipe_is_the_tutorials_and_nothing_of_nvae_is_left(name):
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
def test_a_recipe_has_the_tables_size(name, parameters):
    with torch.device("meta"):
        model = build_model(load_recipe(recipe_path(name), []))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_convolutional_recipes_have_the_tables_widths():
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
def test_penalties_that_would_not_reach_these_models_are_refused(name):
    """They know plain convolutions only, and of a spectrally normalised one would penalise the constant 1."""
    with pytest.raises(ConfigError, match=f"regularizers.strength=0.01: .* model.name={name} needs regularizers"):
        load_recipe(recipe_path(name), ["regularizers.strength=0.01"])


def test_flows_are_chosen_in_words():
    words = ["model.flows={name: iaf, length: 4}"]
    model = build_model(load_recipe(recipe_path("mlp_vae"), words))
    assert len(model.posterior.flows) == 4
