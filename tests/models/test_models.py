"""What is true of every model and option: one test for each claim, for all cases of model_cases.py."""

import ast
import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline import models
from pipeline.models.base import VAE, VAEOutput
from pipeline.recipe import Model
from tests.helpers.model_cases import CASES, build_case, noise_for

STEP = 1e-8
"""Of finite differences: so small that no ReLU changes sign."""

each_case = pytest.mark.parametrize("case", CASES)


def latent_noise(model: VAE, noise: list[Tensor]) -> list[Tensor]:
    """The noise of the latent groups, without that of training."""
    return noise[: len(model.groups)]


def test_every_model_of_the_recipe_has_a_case():
    sections = get_args(get_args(Model)[0])
    assert {section.model_fields["name"].default for section in sections} == {
        case[0]["name"] for case in CASES.values()
    }


@each_case
def test_outputs_have_their_shapes_and_every_parameter_a_gradient(case):
    model, x, noise, condition = build_case(case)
    out = model(x, noise, condition)
    assert isinstance(out, VAEOutput)
    assert out.log_px.shape == out.log_qz.shape == out.log_pz.shape == (5,)
    assert out.kl.shape == (5, len(model.groups))
    assert [units.shape for units in out.kl_units] == [group.shape[:1] for group in model.groups]
    torch.testing.assert_close(torch.stack([units.sum() for units in out.kl_units]), out.kl.mean(0))
    assert all(penalty.shape == (5,) for penalty in out.penalties.values())
    (-out.elbo + sum(out.penalties.values())).mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DDP waits for each
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@each_case
def test_gradients_equal_finite_differences(case):
    """Of log p(x | z) and of the KL, along a random direction in each part of the model: nothing is detached."""
    model, x, noise, condition = build_case(case)
    with torch.no_grad():
        for _ in range(5):
            model(x, noise, condition)  # for the power iteration of spectral normalization to converge
    model.eval()

    def terms() -> Tensor:
        out = model(x, noise, condition)
        return torch.stack([out.log_px.mean(), out.kl.sum(1).mean()])  # (2,)

    named = dict(model.named_parameters())
    parameters = list(named.values())
    log_px, kl = terms()
    gradients = [
        torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for term in (log_px, kl)
    ]
    for part in {name.split(".")[0]: None for name in named}:
        directions = [torch.randn_like(p) * (name.split(".")[0] == part) for name, p in named.items()]
        expected = [sum((g * d).sum() for g, d in zip(each, directions, strict=True)) for each in gradients]
        found = (moved(terms, parameters, directions, STEP) - moved(terms, parameters, directions, -STEP)) / (2 * STEP)
        torch.testing.assert_close(
            torch.stack(expected), found, rtol=1e-4, atol=1e-3, msg=lambda text, part=part: f"{part}: {text}"
        )


@torch.no_grad()
def moved(terms, parameters: list[Tensor], directions: list[Tensor], step: float) -> Tensor:
    """The terms with the parameters moved by `step` times the directions."""
    torch._foreach_add_(parameters, directions, alpha=step)
    found = terms()
    torch._foreach_add_(parameters, directions, alpha=-step)
    return found


@each_case
@torch.no_grad()
def test_sampling_encoding_and_decoding(case):
    model, x, noise, condition = build_case(case)
    model.eval()
    noise = latent_noise(model, noise)
    latents = model.encode(x, noise, condition)
    sampled = model.sample(noise, 0.7, condition)
    reconstructed = model.reconstruct(x, noise, condition)
    assert [z.shape for z in latents] == [(5, *group.shape) for group in model.groups]
    for images in (sampled, reconstructed):
        assert images.shape == x.shape
        assert 0 <= images.min() <= images.max() <= 1
    torch.testing.assert_close(model.decode(latents, condition), reconstructed, rtol=0, atol=0)


@each_case
@torch.no_grad()
def test_samples_with_the_first_groups_given(case):
    """Latents of a sample give that sample, to the bit, however many of them are given; their noise is not used."""
    model, _, noise, condition = build_case(case)
    model.eval()
    noise, other = latent_noise(model, noise), latent_noise(model, noise_for(model, 5, torch.float64, seed=1))
    expected, latents = model.sample_with_latents(noise, 0.7, condition)
    assert torch.equal(model.decode(latents, condition), expected)
    for count in range(len(latents) + 1):
        mixed = [*other[:count], *noise[count:]]
        assert torch.equal(model.sample(mixed, 0.7, condition, latents[:count]), expected)
        _, found = model.sample_with_latents(other, 0.7, condition, latents[:count])
        same = [torch.equal(a, b) for a, b in zip(found, latents, strict=True)]
        assert same == [k < count for k in range(len(latents))]


@each_case
@torch.no_grad()
def test_the_noise_of_latents_is_found_again(case):
    """Of prior samples the noise that they were made of; and noise times the temperatures gives the same samples."""
    model, x, noise, condition = build_case(case)
    model.eval()
    noise = latent_noise(model, noise)
    _, latents = model.sample_with_latents(noise, 1.0, condition)
    for found, made_of in zip(model.prior_noise(latents, condition), noise, strict=True):
        torch.testing.assert_close(found, made_of, rtol=1e-9, atol=1e-9)
    temperatures = [0.9 / (k + 1) for k in range(len(noise))]
    scaled = [t * part for t, part in zip(temperatures, noise, strict=True)]
    torch.testing.assert_close(model.sample(noise, temperatures, condition), model.sample(scaled, 1.0, condition))
    again = model.sample(model.prior_noise(model.encode(x, noise, condition), condition), 1.0, condition)
    torch.testing.assert_close(again, model.reconstruct(x, noise, condition))


@each_case
@torch.no_grad()
def test_the_bound_is_computed_from_the_features(case):
    model, x, noise, condition = build_case(case)
    model.eval()
    features = model.features(x, condition)
    for seed in (0, 1):
        noise = noise_for(model, 5, torch.float64, seed)
        whole, split = model(x, noise, condition), model.bound(x, features, noise, condition)
        torch.testing.assert_close(split.elbo, whole.elbo, rtol=0, atol=0)


@each_case
def test_a_condition_that_does_not_fit_is_refused(case):
    model, x, noise, _ = build_case(case)
    wrong = [torch.ones(5, model.condition_size + 1, dtype=x.dtype)] + ([None] if model.condition_size else [])
    for condition in wrong:
        for call in (
            lambda c: model(x, noise, c),
            lambda c: model.sample(noise, 1.0, c),
            lambda c: model.encode(x, noise, c),
            lambda c: model.decode(latent_noise(model, noise), c),
        ):
            with pytest.raises(ValueError, match=f"takes a condition of {model.condition_size} columns"):
                call(condition)


@each_case
@torch.no_grad()
def test_the_condition_changes_prior_samples_posterior_and_bound(case):
    if not CASES[case][1]:
        pytest.skip("not conditional")
    model, x, noise, condition = build_case(case)
    model.eval()
    same = [part[:1].expand(2, -1, -1, -1) for part in noise]
    one, other = model.sample(latent_noise(model, same), 1.0, condition[:2])
    assert (one - other).abs().max() > 1e-6
    out = model(x[:1].expand(2, -1, -1, -1), same, condition[:2])
    for value in (out.log_px, out.log_pz, out.elbo):
        assert (value[0] - value[1]).abs() > 1e-6


@each_case
@torch.no_grad()
def test_the_kl_is_the_mean_of_log_q_minus_log_p(case):
    """Within 4 standard errors of 200 samples, or exactly where it is a one-sample estimate. The importance-weighted
    bound is above the ELBO.
    """
    model, x, _, condition = build_case(case)
    model.eval()
    count, few = 200, 2
    x = x[:few].repeat_interleave(count, 0)
    condition = None if condition is None else condition[:few].repeat_interleave(count, 0)
    out = model(x, noise_for(model, few * count, x.dtype), condition)
    sampled, kl = (out.log_qz - out.log_pz).view(few, count), out.kl.sum(1).view(few, count)
    error = (sampled - kl).std(1) / count**0.5
    assert ((sampled - kl).mean(1).abs() <= 4 * error + 1e-9).all(), (sampled.mean(1), kl.mean(1), error)
    log_weights = out.log_px.view(few, count) - sampled
    elbo = out.elbo.view(few, count).mean(1)
    assert (log_weights.logsumexp(1) - torch.tensor(count).log() > elbo - 1e-9).all()


@each_case
@torch.no_grad()
def test_the_border_is_an_input_but_not_part_of_the_likelihood(case):
    model, x, noise, condition = build_case(case, "data.size=12", "data.pad=2")
    model.eval()
    assert model.image_shape == (3, 16, 16)
    assert model.num_dimensions == 3 * 12 * 12
    other = x.clone()
    other[:, :, :2] = 1 - other[:, :, :2]
    features = model.features(x, condition)
    inside = model.bound(x, features, noise, condition).log_px
    torch.testing.assert_close(model.bound(other, features, noise, condition).log_px, inside, rtol=0, atol=0)
    assert model(other, noise, condition).log_px.ne(inside).all()
    assert model.sample(latent_noise(model, noise), 1.0, condition).shape == x.shape


@each_case
@torch.no_grad()
def test_memory_format_does_not_change_the_result(case):
    model, x, noise, condition = build_case(case)
    model.eval()
    expected = model(x, noise, condition).elbo
    model.to(memory_format=torch.channels_last)
    found = model(x.contiguous(memory_format=torch.channels_last), noise, condition).elbo
    torch.testing.assert_close(found, expected)


@each_case
def test_mixed_precision_keeps_densities_in_float32(case):
    model, x, noise, condition = build_case(case, dtype=torch.float32)
    expected = copy.deepcopy(model)(x, noise, condition).elbo
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, noise, condition)
    values = (*out[:4], *out.kl_units, *out.penalties.values())
    assert {value.dtype for value in values} == {torch.float32}
    (-out.elbo + sum(out.penalties.values())).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(out.elbo.mean(), expected.mean(), rtol=0.05, atol=1.0)


@pytest.mark.parametrize("temperature", [-0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("case", ["nvae", "mlp_vae"])
def test_a_temperature_below_zero_or_not_finite_is_refused(case, temperature):
    model, _, noise, condition = build_case(case)
    with pytest.raises(ValueError, match=f"temperature {temperature}"):
        model.sample(noise, temperature, condition)


@pytest.mark.parametrize("case", ["nvae", "mlp_vae"])
def test_temperatures_of_another_number_of_groups_are_refused(case):
    model, _, noise, condition = build_case(case)
    count = len(model.groups)
    with pytest.raises(ValueError, match=f"{count + 1} temperatures for {count} latent groups"):
        model.sample(noise, [1.0] * (count + 1), condition)


@pytest.mark.parametrize("path", sorted(Path(models.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_models_open_no_files(path):
    """What a model needs from a file is loaded by its caller and passed to it when it is built."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Name):
            assert node.id != "open"
    assert {name for name in imported if name.split(".")[0] in ("os", "io", "shutil", "pathlib")} == set()
    assert {name for name in imported if name.startswith("pipeline.storage")} == set()
