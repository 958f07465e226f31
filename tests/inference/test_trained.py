"""pipeline.load: the weights and settings of a run, and its models in use."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import pipeline
from pipeline.data.preprocess import to_model_input
from pipeline.evaluation.likelihood_bounds import Draws
from pipeline.inference.passes import IMAGES_PER_PASS
from pipeline.models.noise import draw_noise
from pipeline.storage.checkpoint import Checkpoints
from tests.helpers.model_cases import CASES, make_recipe
from tests.helpers.recipes import tiny_settings
from tests.helpers.trained_runs import STEP, make_run


def small(**changes) -> dict:
    made = tiny_settings("nowhere")
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), small())


@pytest.fixture(scope="module")
def loaded(run):
    return pipeline.load(run, device="cpu")


def pictures(count: int, size: int = 16, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


# ------------------------------------------------------------------------------------------------------------- loading


def test_the_moving_average_is_what_is_loaded(run):
    model = pipeline.load(run)
    stored = Checkpoints(run / "checkpoints").latest().tensors
    state = model.model.state_dict()
    assert (model.step, model.averaged, model.image_shape) == (STEP, True, (3, 16, 16))
    assert all(torch.equal(state[name], tensor) for name, tensor in stored["ema"].items())
    assert any(not torch.equal(state[name], tensor) for name, tensor in stored["model"].items())
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_without_a_moving_average_the_weights_are(tmp_path):
    model = pipeline.load(make_run(tmp_path, small(train={"ema_decay": 0.0})))
    assert not model.averaged


def test_loading_costs_the_caller_no_random_numbers(run):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    pipeline.load(run).sample(2)
    assert torch.equal(before, torch.get_rng_state())


def test_the_checkpoint_is_the_one_that_was_named(run, tmp_path):
    folder = make_run(tmp_path, small())
    found = Checkpoints(folder / "checkpoints").latest()
    Checkpoints(folder / "checkpoints").save(9, found.tensors, found.facts, score=2.0)
    assert pipeline.load(folder).step == 9
    assert pipeline.load(folder, "best").step == STEP
    assert pipeline.load(folder, folder / "checkpoints" / f"step_{STEP:08d}").step == STEP
    (folder / "checkpoints/step_00000009/ema.safetensors").write_bytes(b"cut")
    assert pipeline.load(folder).step == STEP  # the newest good one
    with pytest.raises(ValueError, match=f"no checkpoint at nowhere; available steps: {STEP}, 9"):
        pipeline.load(folder, "nowhere")
    assert pipeline.load(folder, STEP).step == STEP
    assert pipeline.load(folder, str(STEP)).step == STEP
    with pytest.raises(ValueError, match=f"no checkpoint of step 800; available steps: {STEP}, 9"):
        pipeline.load(folder, 800)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder; give the folder of a run"):
        pipeline.load(tmp_path / "nothing")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(run, device):
    with pytest.raises(ValueError, match=f"device {device}: "):
        pipeline.load(run, device=device)


@pytest.mark.parametrize("names", [None, 3, ["a"], ["a", "b", 3], {"a": 1}, "abc"])
def test_class_names_that_make_no_sense_are_numbers(tmp_path, names):
    model = pipeline.load(make_run(tmp_path, small(condition={"name": "class", "num_classes": 3}), names))
    assert model.classes == ("0", "1", "2")


def test_settings_of_another_version_are_refused(run, tmp_path):
    found = Checkpoints(run / "checkpoints").latest()
    facts = json.loads(json.dumps(found.facts))
    facts["settings"]["train"]["from_the_future"] = 1
    Checkpoints(tmp_path / "checkpoints").save(1, found.tensors, facts)
    with pytest.raises(ValueError, match="not those of this version of the pipeline:\ntrain.from_the_future"):
        pipeline.load(tmp_path)
    (tmp_path / "other").mkdir()
    Checkpoints(tmp_path / "other" / "checkpoints").save(1, {"weights": found.tensors["ema"]}, {})
    with pytest.raises(ValueError, match="holds no model with its settings"):
        pipeline.load(tmp_path / "other")


def test_importing_the_package_is_cheap():
    """A script that asks for --help must not wait for torch."""
    code = "import sys, pipeline; print('torch' in sys.modules, callable(pipeline.load))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [
        "False",
        "True",
    ]


# ----------------------------------------------------------------------------------------------- images in, images out


def test_uint8_and_floats_are_the_same_image(run):
    model, x = pipeline.load(run), pictures(3)
    assert torch.equal(model.input(x), model.input(x / 255))
    assert torch.equal(model.input(x), to_model_input(x))
    one, other = model.encode(x), model.encode(x / 255)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def pillow(x: torch.Tensor, mode: str = "RGB") -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()).convert(mode) for image in x]


def test_pillow_images_are_the_images_that_they_show(run):
    model, x = pipeline.load(run), pictures(3)
    expected = model.encode(x)
    for images in (pillow(x), tuple(pillow(x, "RGBA"))):
        assert all(torch.equal(a, b) for a, b in zip(model.encode(images), expected, strict=True))
    assert torch.equal(model.reconstruct(pillow(x[:1])[0]), model.reconstruct(x[:1]))
    assert torch.equal(model.log_likelihood(pillow(x)), model.log_likelihood(x))


@pytest.mark.parametrize("bits", [5, 8])
def test_fewer_bits_are_cut_as_in_training(tmp_path, bits):
    model, x = pipeline.load(make_run(tmp_path, small(data={"bits": bits}))), pictures(2)
    assert torch.equal(model.input(x), to_model_input(x, bits))
    assert torch.equal(model.input(x / 255), to_model_input(x, bits))
    with pytest.raises(ValueError, match="floats are in"):
        model.input(x.float())


def test_padding_is_added_and_removed(tmp_path):
    changes = {"data": {"size": 12, "channels": 1, "pad": 2}, "model": {"likelihood": {"name": "bernoulli"}}}
    model, x = pipeline.load(make_run(tmp_path, small(**changes))), pictures(3, size=12, channels=1)
    inside = model.input(x)
    assert inside.shape == (3, 1, 16, 16)
    assert torch.equal(inside[:, :, 2:14, 2:14], x / 255)
    assert float(inside.sum()) == pytest.approx(float(x.sum()) / 255)
    assert model.sample(2).shape == model.reconstruct(x)[:2].shape == (2, 1, 12, 12)
    whole = model.model.decode(model.encode(x))
    assert torch.equal(model.decode(model.encode(x)), whole[:, :, 2:14, 2:14])


def test_encode_decode_and_sample_are_the_models_own(run):
    model, x = pipeline.load(run), pictures(3)
    noise = draw_noise(model.model.groups, 4, "encode", range(3))
    with torch.no_grad():
        latents = model.model.encode(to_model_input(x), noise)
        images = model.model.decode(latents)
        sampled = model.model.sample(draw_noise(model.model.groups, 4, "sample", range(3)), 0.6)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for ours, theirs in zip(model.encode(x, seed=4), latents, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(model.reconstruct(x, seed=4), images, **close)
    torch.testing.assert_close(model.sample(3, 0.6, seed=4), sampled, **close)


def test_without_a_seed_latents_are_the_means(run):
    model, x = pipeline.load(run), pictures(2)
    zeros = [torch.zeros(2, *group.shape) for group in model.model.groups]
    with torch.no_grad():
        expected = model.model.encode(to_model_input(x), zeros)
    for ours, theirs in zip(model.encode(x, seed=None), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_passes_change_nothing(run):
    """More images than one pass takes: the same as the first and the last of them alone, as far as they can be."""
    model, count = pipeline.load(run), IMAGES_PER_PASS + 3
    many = model.sample(count, seed=2)
    assert many.shape == (count, 3, 16, 16)
    torch.testing.assert_close(many[:5], model.sample(5, seed=2), rtol=1e-4, atol=1e-5)
    x = pictures(count)
    latents = model.encode(x)
    assert [len(group) for group in latents] == [count] * 3
    torch.testing.assert_close(
        model.decode(latents)[-2:], model.decode([g[-2:] for g in latents]), rtol=1e-4, atol=1e-5
    )


def test_float64_runs_work_in_float64(tmp_path):
    model = pipeline.load(make_run(tmp_path, small(train={"precision": "fp64"})))
    assert model.sample(1).dtype == torch.float64
    assert model.encode(pictures(1))[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model: model.encode(pictures(2)[0]), r"images are \(B, 3, 16, 16\), not \(3, 16, 16\)"),
        (lambda model: model.encode(pictures(2, size=12)), r"not \(2, 3, 12, 12\)"),
        (lambda model: model.encode(pictures(1).float()), r"floats are in \[0, 1\]; give uint8"),
        (lambda model: model.encode(pictures(1).long()), "uint8, or floats in .*, not torch.int64"),
        (lambda model: model.encode(torch.full((1, 3, 16, 16), torch.nan)), r"floats are in \[0, 1\]"),
        (lambda model: model.encode(pictures(1)[:0]), "no images were given"),
        (lambda model: model.encode([]), "no images were given"),
        (lambda model: model.encode(pillow(pictures(1, size=12))), "is 12x12; resize it to 16x16"),
        (lambda model: model.encode([pictures(1)]), "a tensor .* or Pillow images, not list"),
        (lambda model: model.encode("face.png"), "a tensor .* or Pillow images, not str"),
        (lambda model: model.sample(0), "count 0: must be at least 1"),
        (
            lambda model: model.log_likelihood(pictures(1), importance_samples=0),
            "must be at least 1",
        ),
        (lambda model: model.decode([torch.zeros(1, 2, 4, 4)]), "latents are one tensor per group"),
        (lambda model: model.sample(1, condition={"Smiling": 1}), "trained without a condition"),
    ],
)
def test_wrong_input_gets_a_message_with_what_is_right(run, act, message):
    with pytest.raises(ValueError, match=message):
        act(pipeline.load(run))


# ---------------------------------------------------------------------------------------------------------- likelihood


def by_hand(model, x: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    """Image by image and draw by draw, from the model's forward pass."""
    rows = []
    for i in range(len(x)):
        weights = []
        for draw in range(samples):
            noise = draw_noise(model.model.groups, seed, f"validate/{draw}", [i], dtype=torch.float64)
            out = model.model(to_model_input(x[i : i + 1], dtype=torch.float64), noise)
            weights.append(out.log_px + out.log_pz - out.log_qz)
        rows.append(torch.cat(weights).logsumexp(0) - np.log(samples))
    return torch.stack(rows)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_log_likelihood_is_the_importance_weighted_bound(tmp_path, samples):
    model = pipeline.load(make_run(tmp_path, small(train={"precision": "fp64"})))
    x = pictures(3)
    found = model.log_likelihood(x, importance_samples=samples, seed=6)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, by_hand(model, x, samples, 6), rtol=1e-10, atol=0)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40))
def test_draws_in_one_pass_or_in_many_are_the_same(loaded, draws, count, rows):
    model = loaded
    x = model.input(pictures(count))

    def noise(draw):
        return draw_noise(model.model.groups, 1, f"{draw}", range(count))

    passes = []
    made = Draws(model.model, x, None, noise)
    bound = made.bound
    made.bound = lambda which: passes.append(len(which) * count) or bound(which)
    with torch.no_grad():
        found = made.log_likelihood(draws, rows)
        one_by_one = torch.stack([weight(bound(range(i, i + 1))) for i in range(draws)]).logsumexp(0) - np.log(draws)
    torch.testing.assert_close(found, one_by_one, rtol=1e-5, atol=1e-2)
    assert max(passes) <= max(rows, count)  # memory has a bound
    assert sum(passes) == draws * count


def weight(out) -> torch.Tensor:
    return (out.log_px + out.log_pz - out.log_qz).double()


@pytest.mark.parametrize("case", CASES)
def test_every_model_can_be_used(case, tmp_path):
    """And several draws in one pass are the draws one by one: what a model keeps for all draws can be repeated."""
    made = make_recipe(case, tmp_path, "train.precision=fp64").model_dump(mode="json")
    model, x = pipeline.load(make_run(tmp_path, made)), pictures(3)
    conditions = {None: None, "class": [1, 0, 3], "attributes": {"Attribute_2": 1}}
    condition = conditions[(made["condition"] or {}).get("name")]
    assert model.sample(3, 0.7, condition=condition).shape == model.reconstruct(x, condition).shape == x.shape
    latents = model.encode(x, condition)
    assert [tuple(group.shape[1:]) for group in latents] == [group.shape for group in model.model.groups]
    assert all(bool(((images >= 0) & (images <= 1)).all()) for images in (model.decode(latents, condition),))
    found = model.log_likelihood(x, condition, importance_samples=5)
    draws = Draws(
        model.model,
        model.input(x),
        model.condition(condition, 3),
        lambda draw: draw_noise(model.model.noise_groups, 0, f"validate/{draw}", range(3), dtype=torch.float64),
    )
    with torch.no_grad():
        torch.testing.assert_close(found, draws.log_likelihood(5, rows=1), rtol=1e-9, atol=0)


def test_more_samples_make_a_tighter_bound(run):
    model, x = pipeline.load(run), pictures(8)
    values = [float(model.log_likelihood(x, importance_samples=n).mean()) for n in (1, 10, 100)]
    assert values[0] < values[1] < values[2]


def test_random_numbers_of_others_do_not_matter(run):
    """Seeds decide, not what Python, NumPy or torch drew before."""
    model, x = pipeline.load(run), pictures(2)
    first = model.sample(2, seed=1), model.log_likelihood(x, importance_samples=2)
    random.random(), np.random.default_rng().random(), torch.rand(3)
    again = model.sample(2, seed=1), model.log_likelihood(x, importance_samples=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(model.sample(2, seed=2), first[0])
