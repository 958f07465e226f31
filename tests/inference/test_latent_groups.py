"""The first latent groups given, temperatures by resolution, noise of latents: names, and methods of TrainedModel."""

import pytest
import torch

import pipeline
from pipeline.inference.latent_groups import (
    find_group,
    listed,
    parse_first_groups,
    parse_temperature,
    resolve_temperature,
    temperature_text,
)
from pipeline.models.base import LatentGroup
from pipeline.models.noise import draw_noise
from tests.helpers.recipes import tiny_settings
from tests.helpers.trained_runs import make_run

NAMES = ["4x4_group00", "4x4_group01", "4x4_group02", "8x8_group00", "16x16_group00", "16x16_group01"]
GROUPS = [LatentGroup(name, (2, 1, 1)) for name in NAMES]
LISTED = "4x4_group00 to 4x4_group02, 8x8_group00, 16x16_group00 to 16x16_group01"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """In float64; three latent groups, one of 4x4 and two of 8x8."""
    settings = tiny_settings("nowhere")
    settings["train"]["precision"] = "fp64"
    return pipeline.load(make_run(tmp_path_factory.mktemp("run"), settings), device="cpu")


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("6", 6), ("4x4", 3), ("8x8", 4), ("16x16", 6), ("4x4_group01", 2), ("8x8_group00", 4)],
)
def test_the_first_groups_by_number_resolution_or_name(text, count):
    assert parse_first_groups(text, GROUPS, "--keep") == count


@pytest.mark.parametrize("text", ["7", "-1", "1.5", "32x32", "4x4_group03", "", "group01"])
def test_other_groups_are_refused_with_those_that_there_are(text):
    with pytest.raises(ValueError, match=f"--keep {text}: give a number from 0 to 6, .* are {LISTED}"):
        parse_first_groups(text, GROUPS, "--keep")


def test_one_group_by_name():
    assert [find_group(name, GROUPS, "--traverse") for name in NAMES] == list(range(6))
    assert find_group("8x8", GROUPS, "--traverse") == 3  # the only one of its resolution
    for text in ("4x4", "3", "2x2"):
        with pytest.raises(ValueError, match=f"--traverse {text}: give one of the groups {LISTED}"):
            find_group(text, GROUPS, "--traverse")
    assert listed(GROUPS[:1]) == "4x4_group00"


def test_temperatures_as_users_write_them():
    assert parse_temperature("0.7") == 0.7
    named = parse_temperature("4x4=0.5, 16x16_group01=0.25,16x16=0.75")
    assert resolve_temperature(named, GROUPS) == (0.5, 0.5, 0.5, 1.0, 0.75, 0.25)
    assert resolve_temperature(0.7, GROUPS) == (0.7,) * 6
    assert resolve_temperature([1, 2, 3, 4, 5, 6], GROUPS) == (1, 2, 3, 4, 5, 6)
    assert parse_temperature(temperature_text(named)) == named
    assert temperature_text(0.7) == "0.7"


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        ({"8x9": 1.0}, "temperature: 8x9 is not known; did you mean 8x8"),
        ({"8x8": -1.0}, "temperature -1.0: must be a finite number of at least 0"),
        ({"8x8": float("nan")}, "temperature nan: must be"),
        ([1.0] * 5, "5 temperatures for 6 latent groups; give one number, or one for each group"),
    ],
)
def test_wrong_temperatures_are_refused(temperature, message):
    with pytest.raises(ValueError, match=message):
        resolve_temperature(temperature, GROUPS)


@pytest.mark.parametrize("text", ["much", "4x4=", "4x4=1,0.7", "4x4=a"])
def test_wrong_words_for_a_temperature_are_refused(text):
    with pytest.raises(ValueError, match=f"--temperature {text}: give a number, or one by resolution"):
        parse_temperature(text)


# ------------------------------------------------------------------------------------------------ groups that are given


@torch.no_grad()
def test_samples_keep_the_fixed_groups(model):
    """One image at a time, from the model's own interface; no group fixed is `sample`, all of them `decode`."""
    latents = model.encode(pictures(3), seed=1)
    temperature = {"4x4": 0.5, "8x8_group01": 2.0}
    for count in range(4):
        found = model.sample(3, temperature, seed=2, first=5, fixed=latents[:count])
        for i in range(3):
            noise = draw_noise(model.model.groups, 2, "sample", [5 + i], dtype=torch.float64)
            given = [group[i : i + 1] for group in latents[:count]]
            torch.testing.assert_close(found[i : i + 1], model.model.sample(noise, [0.5, 1.0, 2.0], None, given))
    assert torch.equal(model.sample(3, 0.7, fixed=latents), model.decode(latents))
    assert torch.equal(model.sample(3, 0.7, fixed=[]), model.sample(3, 0.7))


def test_latents_of_a_sample_give_it_again(model):
    images, latents = model.sample_with_latents(4, 0.8, seed=3)
    assert torch.equal(images, model.sample(4, 0.8, seed=3))
    for count in range(4):
        assert torch.equal(model.sample(4, 0.8, seed=3, fixed=latents[:count]), images)
    other = model.sample(4, 0.8, seed=4, fixed=latents[:1])
    assert all(not torch.equal(a, b) for a, b in zip(images, other, strict=True))


def test_one_row_of_latents_is_for_all_samples(model):
    _, latents = model.sample_with_latents(1, seed=3)
    many = model.sample(3, seed=4, fixed=[group.expand(3, -1, -1, -1) for group in latents[:2]])
    assert torch.equal(model.sample(3, seed=4, fixed=latents[:2]), many)


@torch.no_grad()
def test_reconstructions_from_the_first_groups(model):
    """The others are the means of their priors, group after group; or samples from these."""
    x = pictures(2)
    latents = model.encode(x, seed=5)
    zeros = [torch.zeros_like(group) for group in latents]
    for count in range(4):
        means = model.model.sample(zeros, 1.0, None, latents[:count])
        torch.testing.assert_close(model.reconstruct(x, seed=5, groups=count), means)
        sampled = model.sample(2, 0.7, seed=5, fixed=latents[:count])
        torch.testing.assert_close(model.reconstruct(x, seed=5, groups=count, temperature=0.7), sampled)
    assert torch.equal(model.reconstruct(x, seed=5, groups=3), model.reconstruct(x, seed=5))


def test_noise_and_latents_are_converted_both_ways(model):
    noise = draw_noise(model.model.groups, 1, "sample", range(3), dtype=torch.float64)
    images, latents = model.sample_with_latents(3, seed=1)
    for found, expected in zip(model.to_noise(latents), noise, strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(model.from_noise(noise), images)
    assert torch.equal(model.from_noise(noise, {"8x8": 0.3}), model.sample(3, {"8x8": 0.3}, seed=1))
    latents = model.encode(pictures(3))
    torch.testing.assert_close(model.from_noise(model.to_noise(latents)), model.decode(latents))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m, z: m.sample(2, fixed=z[:1]), r"fixed latents are \(2 or 1, ...\) each, of the first of"),
        (lambda m, z: m.sample(3, fixed=z[1:]), "fixed latents are"),
        (lambda m, z: m.sample(3, fixed=[*z, z[-1]]), "fixed latents are"),
        (lambda m, z: m.reconstruct(pictures(1), groups=4), "groups 4: must be from 0 to 3"),
        (lambda m, z: m.reconstruct(pictures(1), groups=-1), "groups -1: must be from 0 to 3"),
        (lambda m, z: m.from_noise(z[:2]), "latents are one tensor per group"),
        (lambda m, z: m.sample(1, {"2x2": 1.0}), "temperature: 2x2 is not known. Known: 4x4, 8x8, 4x4_group00"),
        (lambda m, z: m.sample(1, [1.0]), "1 temperatures for 3 latent groups"),
    ],
)
def test_wrong_input_gets_a_message_with_what_is_right(model, act, message):
    with pytest.raises(ValueError, match=message):
        act(model, model.encode(pictures(3)))
