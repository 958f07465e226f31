"""Properties of the NVAE model, whatever its numbers: the numbers are checked in test_nvae_golden.py."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.likelihoods import BernoulliLikelihood, LogisticMixtureLikelihood, NormalLikelihood
from pipeline.models.noise import draw_noise
from pipeline.models.nvae import NVAE, NVAEConfig
from pipeline.models.nvae_reference import (
    config_from_reference,
    export_state_dict,
    import_state_dict,
    reference_parameter_order,
)
from pipeline.nn.layers import WNConv2d, find_convs

SMALL = {
    "groups_per_scale": (1, 2),
    "encoder_channels": 8,
    "decoder_channels": 8,
    "latent_channels": 3,
    "num_preprocess_cells": 1,
    "num_encoder_cells": 1,
    "num_decoder_cells": 1,
    "likelihood": LogisticMixtureLikelihood(num_components=2),
}
VARIANTS = {
    "default": {},
    "flows": {"num_flows": 2},
    "no squeeze-excitation": {"squeeze_excitation": False},
    "absolute posterior": {"residual_posterior": False},
    "wider decoder": {"decoder_channels": 12},
    "two blocks": {"num_blocks": 2, "num_preprocess_cells": 2, "num_postprocess_cells": 1},
    "normal": {"likelihood": NormalLikelihood()},
    "bernoulli": {"likelihood": BernoulliLikelihood()},
    "vanilla": {"groups_per_scale": (1,)},
    "vanilla with flows": {"groups_per_scale": (1,), "num_flows": 1, "decoder_channels": 12},
    "res_bnswish": {"cells": "res_bnswish"},
    "mbconv_sep": {"cells": "mbconv_sep"},
}


def build(size: int = 16, channels: int = 3, bits: int = 8, border: int = 0, **changes) -> NVAE:
    torch.manual_seed(0)
    return NVAE(NVAEConfig(**(SMALL | changes)), (channels, size, size), border, bits)


def batch(model: NVAE, n: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Random images on the grey levels, and noise."""
    levels = 2**model.bits - 1
    x = torch.randint(0, levels + 1, (n, *model.image_shape), generator=torch.Generator().manual_seed(1))
    return (x / levels).to(dtype), draw_noise(model.groups, 0, "test", range(n), dtype=dtype)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_shapes_and_every_parameter_learns(changes):
    model = build(**changes)
    x, noise = batch(model)
    out = model(x, noise)
    num_groups = len(model.groups)
    assert out.log_px.shape == out.log_qz.shape == out.log_pz.shape == (4,)
    assert out.kl.shape == (4, num_groups)
    assert [units.shape for units in out.kl_units] == [(3,)] * num_groups
    (-out.elbo.mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name.endswith("weight") or name == "start":  # biases and lengths may cancel in a batch norm
            assert parameter.grad.ne(0).any(), name
    for images in (model.sample(noise), model.reconstruct(x, noise)):
        assert images.shape == x.shape
        assert images.min() >= 0
        assert images.max() <= 1


def test_groups_are_named_and_shaped_in_drawing_order():
    model = build(size=32, groups_per_scale=(2, 3), latent_channels=5)
    assert [group.name for group in model.groups] == [
        *("8x8_group00", "8x8_group01"),
        *("16x16_group00", "16x16_group01", "16x16_group02"),
    ]
    assert [group.shape for group in model.groups] == [(5, 8, 8)] * 2 + [(5, 16, 16)] * 3


def test_kl_is_analytic_without_flows_and_a_sample_with_them():
    for num_flows in (0, 1):
        model = build(num_flows=num_flows).double().eval()
        x, noise = batch(model, dtype=torch.float64)
        out = model(x, noise)
        sampled = (out.log_qz - out.log_pz).detach()
        assert torch.allclose(out.kl.sum(1), sampled, rtol=1e-10) == (num_flows == 1)
        torch.testing.assert_close(torch.stack([units.sum() for units in out.kl_units]), out.kl.mean(0))


def test_analytic_kl_is_the_mean_of_sampled_ones():
    model = build(size=4, groups_per_scale=(1,)).double().eval()
    x, _ = batch(model, 1, torch.float64)
    n = 2000
    with torch.no_grad():
        out = model(x.expand(n, -1, -1, -1), draw_noise(model.groups, 0, "kl", range(n), dtype=torch.float64))
    sampled = out.log_qz - out.log_pz
    error = sampled.std().item() / n**0.5
    assert sampled.mean().item() == pytest.approx(out.kl[0, 0].item(), abs=5 * error)


def test_output_is_a_function_of_images_and_noise_alone():
    model = build(num_flows=1).eval()
    x, noise = batch(model)
    first = model(x, noise)
    torch.manual_seed(99)
    torch.testing.assert_close(model(x, noise).elbo, first.elbo, rtol=0, atol=0)
    other = draw_noise(model.groups, 1, "test", range(4))
    assert model(x, other).log_px.ne(first.log_px).all()
    each = [model(x[i : i + 1], [eps[i : i + 1] for eps in noise]).elbo for i in range(4)]
    torch.testing.assert_close(torch.cat(each), first.elbo, rtol=1e-5, atol=1e-3)  # in eval mode images are independent


def test_temperature_zero_samples_are_all_alike():
    model = build().eval()
    _, noise = batch(model)
    cold = model.sample(noise, temperature=1e-6)
    torch.testing.assert_close(cold, cold[:1].expand_as(cold), rtol=0, atol=1e-3)
    warm = model.sample(noise, temperature=1.0)
    assert (warm - warm[:1]).abs().max() > 10 * (cold - cold[:1]).abs().max()


def test_sampling_uses_neither_encoder_nor_flows():
    model = build(num_flows=1).eval()
    _, noise = batch(model)
    before = model.sample(noise)
    for name, parameter in model.named_parameters():
        if name.startswith(("stem", "preprocess", "encoder", "posteriors", "flows")):
            nn.init.constant_(parameter, torch.nan)
    torch.testing.assert_close(model.sample(noise), before, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_bits_set_the_bins(bits):
    model = build(bits=bits).eval()
    x, noise = batch(model)
    likelihood = model.likelihood(model.infer(x, noise)[0])
    assert likelihood.bits == bits
    torch.testing.assert_close(likelihood.log_prob(x).sum((1, 2)), model(x, noise).log_px)


def test_border_counts_in_neither_likelihood_nor_dimensions():
    model = build(channels=1, border=2, likelihood=BernoulliLikelihood()).eval()
    assert model.num_dimensions == 12 * 12
    x, noise = batch(model)
    logits, _ = model.infer(x, noise)
    inside = model.likelihood(logits[:, :, 2:-2, 2:-2]).log_prob(x[:, :, 2:-2, 2:-2]).sum((1, 2, 3))
    torch.testing.assert_close(model(x, noise).log_px, inside)
    assert model.sample(noise).shape == (4, 1, 16, 16)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 12, 20, 28])
def test_any_size_that_divides(size):
    model = build(size=size)
    x, noise = batch(model)
    assert noise[0].shape[-1] == size // 4
    assert model(x, noise).elbo.isfinite().all()
    assert model.sample(noise).shape == x.shape


def test_a_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match=r"image size 30 is not a multiple of 4.* 28 or 32 would work"):
        build(size=30)
    with pytest.raises(ValueError, match=r"image size 2 is not a multiple of 4.* 4 would work"):
        build(size=2)


def test_images_must_be_square():
    with pytest.raises(ValueError, match="square images, got 16x32"):
        NVAE(NVAEConfig(**SMALL), (3, 16, 32))


# ---- precision and memory format -------------------------------------------------------------------------------------


def test_bfloat16_is_close_and_densities_stay_in_float32():
    model = build(num_flows=1, groups_per_scale=(2, 2)).train()
    x, noise = batch(model, n=8)
    full = copy.deepcopy(model)(x, noise)
    with torch.autocast("cpu", torch.bfloat16):
        logits, draws = copy.deepcopy(model).infer(x, noise)
        out = model(x, noise)
    assert logits.dtype == torch.bfloat16  # the network itself did run in half precision
    for draw in draws:
        values = (draw.base, draw.z, draw.posterior.mean, draw.posterior.sigma, draw.prior.mean, draw.prior.sigma)
        assert {value.dtype for value in values} == {torch.float32}
    assert {value.dtype for value in (*out[:4], *out.kl_units)} == {torch.float32}
    torch.testing.assert_close(out.elbo.mean(), full.elbo.mean(), rtol=0.02, atol=0)
    (-out.elbo.mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_residual_posteriors_are_summed_in_float32_under_autocast():
    model = build(groups_per_scale=(2, 2))
    raw: dict[str, Tensor] = {}
    for name in ("posteriors", "priors"):
        for k, module in enumerate(getattr(model, name)):
            module.register_forward_hook(lambda _, __, output, key=f"{name}.{k}": raw.update({key: output}))
    with torch.autocast("cpu", torch.bfloat16):
        _, draws = model.infer(*batch(model))
    for k, draw in enumerate(draws[1:], start=1):
        posterior, prior = raw[f"posteriors.{k}"], raw[f"priors.{k - 1}"]
        assert posterior.dtype == prior.dtype == torch.bfloat16
        mean, log_sigma = (5 * torch.tanh((posterior.float() + prior.float()) / 5)).chunk(2, dim=1)
        torch.testing.assert_close(draw.posterior.mean, mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(draw.posterior.sigma, log_sigma.exp() + 0.01, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("groups_per_scale", [(1, 2), (1,)])
def test_the_condition_reaches_the_first_group(groups_per_scale):
    """Its prior has no decoder state to hear of it from: mean and sigma are the embedding's own, softly clamped, where
    its KL is taken and where it is sampled.
    """
    torch.manual_seed(0)
    config = NVAEConfig(**(SMALL | {"groups_per_scale": groups_per_scale}))
    model = NVAE(config, (3, 16, 16), condition_size=4).double().eval()
    nn.init.normal_(model.conditioning.priors[0].weight, std=2.0)
    x, noise = batch(model, dtype=torch.float64)
    condition = torch.eye(4, dtype=torch.float64)
    _, draws = model.infer(x, noise, condition)
    mean, log_sigma = (5 * torch.tanh(model.conditioning.priors[0].weight.detach() / 5)).T.chunk(2, dim=1)  # (4, 3)
    sigma = log_sigma.exp() + 0.01
    size = draws[0].z.shape[2:]
    for found, expected in ((draws[0].prior.mean, mean), (draws[0].prior.sigma, sigma)):
        torch.testing.assert_close(found, expected[:, :, None, None].expand(-1, -1, *size))
    merge, merged = model.decoder[0].combine if model.decoder else model.decoder_start, []
    merge.register_forward_pre_hook(lambda _, inputs: merged.append(inputs[0][:, -3:]))
    model.sample(noise, 0.5, condition)
    drawn = mean[:, :, None, None] + 0.5 * sigma[:, :, None, None] * noise[0]
    torch.testing.assert_close(merged, [drawn])


@pytest.mark.parametrize("groups_per_scale", [(1, 2), (1,)])
def test_the_condition_reaches_the_decoders_start(groups_per_scale):
    """The first group's latent being the same, the pictures differ, and only where the condition does."""
    torch.manual_seed(0)
    config = NVAEConfig(**(SMALL | {"groups_per_scale": groups_per_scale}))
    model = NVAE(config, (3, 16, 16), condition_size=4).double().eval()
    latents = [part[:1].expand(4, -1, -1, -1) for part in batch(model, dtype=torch.float64)[1]]
    condition = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]
    assert torch.equal(*model.decode(latents, condition)[1:3])  # a fresh model hears nothing
    nn.init.normal_(model.conditioning.start.weight)
    same, one, two, three = model.decode(latents, condition)
    assert torch.equal(same, one)
    assert (one - two).abs().max() > 1e-3
    assert (two - three).abs().max() > 1e-3


def test_float64_stays_float64():
    model = build(num_flows=1).double()
    x, noise = batch(model, dtype=torch.float64)
    logits, draws = model.infer(x, noise)
    assert {tensor.dtype for tensor in (logits, *model(x, noise)[:4])} == {torch.float64}
    assert {value.dtype for draw in draws for value in (draw.z, draw.prior.sigma)} == {torch.float64}
    assert model.sample(noise).dtype == torch.float64


@pytest.mark.parametrize("converted", ["model", "images"])
def test_channels_last_holds_throughout_and_changes_nothing(converted):
    plain = build(num_flows=1)
    model = copy.deepcopy(plain)
    x, noise = batch(model)
    expected = plain(x, noise).elbo
    broken = []

    def check(module, inputs, output):
        if not output.is_contiguous(memory_format=torch.channels_last):
            broken.append(type(module).__name__)

    if converted == "model":
        model = model.to(memory_format=torch.channels_last)
    else:
        x = x.contiguous(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or module in list(model.compilable_cells()):
            module.register_forward_hook(check)
    torch.testing.assert_close(model(x, noise).elbo, expected, rtol=1e-5, atol=1e-2)
    if converted == "model":
        model.sample(noise)
    assert broken == []


def test_each_convolution_is_normalised_once_per_pass(monkeypatch):
    model = build(num_flows=1)
    x, noise = batch(model)
    own = []
    monkeypatch.setattr(
        "pipeline.nn.layers.WNConv2d.current_weight",
        lambda conv: own.append(conv.handed_weight is None) or conv.handed_weight,
    )
    for run in (lambda: model(x, noise), lambda: model.sample(noise), lambda: model.reconstruct(x, noise)):
        run()
    assert own
    assert not any(own)
    assert all(conv.handed_weight is None for conv in find_convs(model).values() if isinstance(conv, WNConv2d))


def test_a_copy_is_independent():
    model = build().eval()
    x, noise = batch(model)
    before = model(x, noise).elbo
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(model(x, noise).elbo, before, rtol=0, atol=0)
    assert other(x, noise).elbo.ne(before).all()


# ---- the reference release -------------------------------------------------------------------------------------------

COMMON = {
    "arch_instance": "res_mbconv",
    "num_latent_per_group": 20,
    "num_cell_per_cond_enc": 2,
    "num_cell_per_cond_dec": 2,
    "use_se": True,
    "res_dist": True,
    "min_groups_per_scale": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_cells": 2,
}


def reference_args(
    dataset: str, width: int, scales: int, groups: int, blocks: int = 1, flows: int = 1, **others
) -> dict:
    sizes = {"num_channels_enc": width, "num_channels_dec": width, "num_latent_scales": scales, "num_nf": flows}
    blocks = {"num_preprocess_blocks": blocks, "num_postprocess_blocks": blocks, "num_groups_per_scale": groups}
    return COMMON | sizes | blocks | {"dataset": dataset} | others


PUBLISHED = {
    "mnist": reference_args(
        "mnist", 32, 2, 10, blocks=2, flows=0, ada_groups=True, num_preprocess_cells=3, num_postprocess_cells=3
    ),
    "cifar10": reference_args("cifar10", 128, 1, 30),
    "celeba_64": reference_args("celeba_64", 64, 3, 20, ada_groups=True),
    "imagenet_32": reference_args("imagenet_32", 192, 1, 28),
    "celeba_256": reference_args(
        "celeba_256", 30, 5, 16, flows=2, ada_groups=True, min_groups_per_scale=4, num_x_bits=5
    ),
}


@pytest.mark.parametrize(
    ("recipe", "millions", "tensors", "groups", "convs", "norms", "start"),
    [
        ("mnist", 33.363, 1269, (5, 10), 255, 214, (256, 4, 4)),
        ("cifar10", 130.852, 2566, (30,), 610, 364, (256, 16, 16)),
        ("celeba_64", 153.281, 3072, (5, 10, 20), 730, 436, (512, 8, 8)),
        ("imagenet_32", 268.509, 2398, (28,), 570, 340, (384, 16, 16)),
        ("celeba_256", 330.799, 3746, (4, 4, 4, 8, 16), 986, 460, (960, 8, 8)),
    ],
)
def test_published_recipes_have_the_published_sizes(recipe, millions, tensors, groups, convs, norms, start):
    config, image_shape, border, bits = config_from_reference(PUBLISHED[recipe])
    with torch.device("meta"):
        model = NVAE(config, image_shape, border, bits)
    parameters = list(model.parameters())
    assert round(sum(parameter.numel() for parameter in parameters) / 1e6, 3) == millions
    assert len(parameters) == tensors
    assert config.groups_per_scale == groups
    assert len(model.groups) == sum(groups)
    assert len(find_convs(model)) == convs
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms
    assert model.start.shape == start
    assert (border, bits) == (2 if recipe == "mnist" else 0, 5 if recipe == "celeba_256" else 8)


def test_options_that_old_releases_lack():
    args = reference_args("celeba_64", 8, 3, 4)
    del args["min_groups_per_scale"]
    config, image_shape, _, bits = config_from_reference(args)
    assert config.groups_per_scale == (4, 4, 4)
    assert config.likelihood == LogisticMixtureLikelihood(num_components=10)
    assert (image_shape, bits) == ((3, 64, 64), 8)
    assert config_from_reference(args | {"num_mixture_dec": 1})[0].likelihood == NormalLikelihood()


def test_reference_options_that_make_no_model_are_refused():
    with pytest.raises(ValueError, match="num_postprocess_blocks differ"):
        config_from_reference(reference_args("cifar10", 8, 1, 2) | {"num_postprocess_blocks": 2})
    with pytest.raises(ValueError, match="'tiny_pictures'"):
        config_from_reference(reference_args("tiny_pictures", 8, 1, 2))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_state_dict_survives_the_round_trip(changes):
    model = build(**changes)
    state = model.state_dict()
    exported = export_state_dict(state)
    returned = import_state_dict(exported)
    assert list(returned) == list(state)
    assert all(torch.equal(returned[key], state[key]) for key in state)
    order = reference_parameter_order(model)
    assert order == [key for key in exported if key in set(order)]
    aliases = [key for key in exported if key.endswith("weight_normalized")]
    plain_convs = [conv for conv in find_convs(model).values() if not isinstance(conv, WNConv2d)]
    assert len(aliases) == len(plain_convs)
    assert all(exported[alias] is exported[alias.removesuffix("_normalized")] for alias in aliases)
    without = {key: tensor for key, tensor in exported.items() if key not in aliases}
    assert list(import_state_dict(without)) == list(state)


def test_an_alias_that_differs_is_refused():
    exported = export_state_dict(build().state_dict())
    alias = next(key for key in exported if key.endswith("weight_normalized"))
    exported[alias] = exported[alias] + 1
    with pytest.raises(ValueError, match=f"{alias} differs from the weight"):
        import_state_dict(exported)


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="'discriminator.weight' is no key"):
        import_state_dict({"discriminator.weight": torch.zeros(1)})


def test_the_unused_start_of_a_vanilla_reference_is_left_out():
    model = build(groups_per_scale=(1,))
    exported = export_state_dict(model.state_dict()) | {"prior_ftr0": torch.zeros(16, 8, 8)}
    assert set(import_state_dict(exported)) == set(model.state_dict())
