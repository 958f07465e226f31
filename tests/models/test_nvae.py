"""Properties of NVAE beyond test_models.py. test_nvae_golden.py checks its numbers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.likelihoods import BernoulliLikelihood
from pipeline.models.noise import draw_noise
from pipeline.models.nvae import NVAE, NVAEConfig
from pipeline.nn import weight_cache
from pipeline.nn.layers import WeightStack, find_convs
from tests.helpers.nvae_cases import NVAE_VARIANTS, SMALL_NVAE, build_nvae


def batch(model: NVAE, n: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Random images on the gray levels, and noise."""
    levels = 2**model.bits - 1
    x = torch.randint(0, levels + 1, (n, *model.image_shape), generator=torch.Generator().manual_seed(1))
    return (x / levels).to(dtype), draw_noise(model.groups, 0, "test", range(n), dtype=dtype)


@pytest.mark.parametrize("changes", NVAE_VARIANTS.values(), ids=NVAE_VARIANTS)
def test_shapes_and_every_parameter_learns(changes):
    model = build_nvae(**changes)
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


def test_groups_are_named_and_shaped_in_the_order_of_sampling():
    model = build_nvae(size=32, groups_per_scale=(2, 3), latent_channels=5)
    assert [group.name for group in model.groups] == [
        *("8x8_group00", "8x8_group01"),
        *("16x16_group00", "16x16_group01", "16x16_group02"),
    ]
    assert [group.shape for group in model.groups] == [(5, 8, 8)] * 2 + [(5, 16, 16)] * 3


def test_kl_is_analytic_without_flows_and_a_sample_with_them():
    for num_flows in (0, 1):
        model = build_nvae(num_flows=num_flows).double().eval()
        x, noise = batch(model, dtype=torch.float64)
        out = model(x, noise)
        sampled = (out.log_qz - out.log_pz).detach()
        assert torch.allclose(out.kl.sum(1), sampled, rtol=1e-10) == (num_flows == 1)
        torch.testing.assert_close(torch.stack([units.sum() for units in out.kl_units]), out.kl.mean(0))


def test_analytic_kl_is_the_mean_of_sampled_ones():
    model = build_nvae(size=4, groups_per_scale=(1,)).double().eval()
    x, _ = batch(model, 1, torch.float64)
    n = 2000
    with torch.no_grad():
        out = model(x.expand(n, -1, -1, -1), draw_noise(model.groups, 0, "kl", range(n), dtype=torch.float64))
    sampled = out.log_qz - out.log_pz
    error = sampled.std().item() / n**0.5
    assert sampled.mean().item() == pytest.approx(out.kl[0, 0].item(), abs=5 * error)


def test_output_is_a_function_of_images_and_noise_alone():
    model = build_nvae(num_flows=1).eval()
    x, noise = batch(model)
    first = model(x, noise)
    torch.manual_seed(99)
    torch.testing.assert_close(model(x, noise).elbo, first.elbo, rtol=0, atol=0)
    other = draw_noise(model.groups, 1, "test", range(4))
    assert model(x, other).log_px.ne(first.log_px).all()
    each = [model(x[i : i + 1], [eps[i : i + 1] for eps in noise]).elbo for i in range(4)]
    torch.testing.assert_close(torch.cat(each), first.elbo, rtol=1e-5, atol=1e-3)  # in eval mode images are independent


def test_samples_at_temperature_zero_are_equal():
    model = build_nvae().eval()
    _, noise = batch(model)
    cold = model.sample(noise, temperature=1e-6)
    torch.testing.assert_close(cold, cold[:1].expand_as(cold), rtol=0, atol=1e-3)
    warm = model.sample(noise, temperature=1.0)
    assert (warm - warm[:1]).abs().max() > 10 * (cold - cold[:1]).abs().max()


def test_sampling_uses_neither_encoder_nor_flows():
    model = build_nvae(num_flows=1).eval()
    _, noise = batch(model)
    before = model.sample(noise)
    for name, parameter in model.named_parameters():
        if name.startswith(("stem", "preprocess", "encoder", "posteriors", "flows")):
            nn.init.constant_(parameter, torch.nan)
    torch.testing.assert_close(model.sample(noise), before, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_bits_set_the_bins(bits):
    model = build_nvae(bits=bits).eval()
    x, noise = batch(model)
    likelihood = model.likelihood(model.infer(x, noise)[0])
    assert likelihood.bits == bits
    torch.testing.assert_close(likelihood.log_prob(x).sum((1, 2)), model(x, noise).log_px)


def test_border_counts_in_neither_likelihood_nor_dimensions():
    model = build_nvae(channels=1, border=2, likelihood=BernoulliLikelihood()).eval()
    assert model.num_dimensions == 12 * 12
    x, noise = batch(model)
    logits, _ = model.infer(x, noise)
    inside = model.likelihood(logits[:, :, 2:-2, 2:-2]).log_prob(x[:, :, 2:-2, 2:-2]).sum((1, 2, 3))
    torch.testing.assert_close(model(x, noise).log_px, inside)
    assert model.sample(noise).shape == (4, 1, 16, 16)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 12, 20, 28])
def test_any_size_that_divides(size):
    model = build_nvae(size=size)
    x, noise = batch(model)
    assert noise[0].shape[-1] == size // 4
    assert model(x, noise).elbo.isfinite().all()
    assert model.sample(noise).shape == x.shape


def test_a_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match=r"image size 30 is not a multiple of 4.* 28 or 32 would work"):
        build_nvae(size=30)
    with pytest.raises(ValueError, match=r"image size 2 is not a multiple of 4.* 4 would work"):
        build_nvae(size=2)


def test_images_must_be_square():
    with pytest.raises(ValueError, match="square images, got 16x32"):
        NVAE(NVAEConfig(**SMALL_NVAE), (3, 16, 32))


# ---- precision and memory format -------------------------------------------------------------------------------------


def test_bfloat16_is_close_and_densities_stay_in_float32():
    model = build_nvae(num_flows=1, groups_per_scale=(2, 2)).train()
    x, noise = batch(model, n=8)
    full = copy.deepcopy(model)(x, noise)
    with torch.autocast("cpu", torch.bfloat16):
        logits, latents = copy.deepcopy(model).infer(x, noise)
        out = model(x, noise)
    assert logits.dtype == torch.bfloat16  # the network itself did run in half precision
    for latent in latents:
        values = (latent.base, latent.z)
        values += tuple(value for p in (latent.posterior, latent.prior) for value in (p.mean, p.sigma))
        assert {value.dtype for value in values} == {torch.float32}
    assert {value.dtype for value in (*out[:4], *out.kl_units)} == {torch.float32}
    torch.testing.assert_close(out.elbo.mean(), full.elbo.mean(), rtol=0.02, atol=0)
    (-out.elbo.mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_residual_posteriors_are_summed_in_float32_under_autocast():
    model = build_nvae(groups_per_scale=(2, 2))
    raw: dict[str, Tensor] = {}
    for name in ("posteriors", "priors"):
        for k, module in enumerate(getattr(model, name)):
            module.register_forward_hook(lambda _, __, output, key=f"{name}.{k}": raw.update({key: output}))
    with torch.autocast("cpu", torch.bfloat16):
        _, latents = model.infer(*batch(model))
    for k, latent in enumerate(latents[1:], start=1):
        posterior, prior = raw[f"posteriors.{k}"], raw[f"priors.{k - 1}"]
        assert posterior.dtype == prior.dtype == torch.bfloat16
        mean, log_sigma = (5 * torch.tanh((posterior.float() + prior.float()) / 5)).chunk(2, dim=1)
        torch.testing.assert_close(latent.posterior.mean, mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(latent.posterior.sigma, log_sigma.exp() + 0.01, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("groups_per_scale", [(1, 2), (1,)])
def test_the_condition_reaches_the_first_group(groups_per_scale):
    """The first prior has no decoder state: its mean and sigma are the clamped embedding, in the KL and in samples."""
    torch.manual_seed(0)
    config = NVAEConfig(**(SMALL_NVAE | {"groups_per_scale": groups_per_scale}))
    model = NVAE(config, (3, 16, 16), condition_size=4).double().eval()
    nn.init.normal_(model.conditioning.priors[0].weight, std=2.0)
    x, noise = batch(model, dtype=torch.float64)
    condition = torch.eye(4, dtype=torch.float64)
    _, latents = model.infer(x, noise, condition)
    mean, log_sigma = (5 * torch.tanh(model.conditioning.priors[0].weight.detach() / 5)).T.chunk(2, dim=1)  # (4, 3)
    sigma = log_sigma.exp() + 0.01
    size = latents[0].z.shape[2:]
    for found, expected in ((latents[0].prior.mean, mean), (latents[0].prior.sigma, sigma)):
        torch.testing.assert_close(found, expected[:, :, None, None].expand(-1, -1, *size))
    merge, merged = model.decoder[0].combine if model.decoder else model.decoder_start, []
    merge.register_forward_pre_hook(lambda _, inputs: merged.append(inputs[0][:, -3:]))
    model.sample(noise, 0.5, condition)
    sampled = mean[:, :, None, None] + 0.5 * sigma[:, :, None, None] * noise[0]
    torch.testing.assert_close(merged, [sampled])


@pytest.mark.parametrize("groups_per_scale", [(1, 2), (1,)])
def test_the_condition_reaches_the_decoders_start(groups_per_scale):
    """With the same latents, the images differ if and only if the conditions do."""
    torch.manual_seed(0)
    config = NVAEConfig(**(SMALL_NVAE | {"groups_per_scale": groups_per_scale}))
    model = NVAE(config, (3, 16, 16), condition_size=4).double().eval()
    latents = [part[:1].expand(4, -1, -1, -1) for part in batch(model, dtype=torch.float64)[1]]
    condition = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]
    assert torch.equal(*model.decode(latents, condition)[1:3])  # the embedding is initialized to zero
    nn.init.normal_(model.conditioning.start.weight)
    same, one, two, three = model.decode(latents, condition)
    assert torch.equal(same, one)
    assert (one - two).abs().max() > 1e-3
    assert (two - three).abs().max() > 1e-3


def test_float64_stays_float64():
    model = build_nvae(num_flows=1).double()
    x, noise = batch(model, dtype=torch.float64)
    logits, latents = model.infer(x, noise)
    assert {tensor.dtype for tensor in (logits, *model(x, noise)[:4])} == {torch.float64}
    assert {value.dtype for latent in latents for value in (latent.z, latent.prior.sigma)} == {torch.float64}
    assert model.sample(noise).dtype == torch.float64


@pytest.mark.parametrize("converted", ["model", "images"])
def test_every_layer_keeps_channels_last_and_the_result_is_the_same(converted):
    plain = build_nvae(num_flows=1)
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


@pytest.mark.parametrize("method", ["forward", "features", "bound", "encode", "decode", "sample", "infer", "generate"])
def test_a_public_method_prepares_all_weights_once(method, monkeypatch):
    model = build_nvae(num_flows=1)
    x, noise = batch(model)
    arguments = {"features": (x,), "bound": (x, model.features(x), noise), "decode": (model.encode(x, noise),)}
    arguments |= dict.fromkeys(("sample", "generate"), (noise,))
    computed, plain = [], weight_cache.weight_stacks

    def counted(convs: list[nn.Conv2d]) -> list[WeightStack]:
        computed.append(len(convs))
        return plain(convs)

    monkeypatch.setattr(weight_cache, "weight_stacks", counted)
    getattr(model, method)(*arguments.get(method, (x, noise)))
    convs = find_convs(model).values()
    assert computed == [len(convs)]
    assert all(conv.cached_weight is None for conv in convs)


def test_a_copy_is_independent():
    model = build_nvae().eval()
    x, noise = batch(model)
    before = model(x, noise).elbo
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(model(x, noise).elbo, before, rtol=0, atol=0)
    assert other(x, noise).elbo.ne(before).all()
