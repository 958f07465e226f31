"""edit.py --keep-groups, --traverse and animations: the pictures, and wrong arguments."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence, features

import pipeline
from pipeline.data.preprocess import to_model_input
from pipeline.data.shards import TarShards
from pipeline.edit import main
from pipeline.evaluation.images import to_uint8
from pipeline.inference.editing import Subject
from pipeline.inference.group_pictures import find_directions, traversed
from pipeline.models.noise import draw_noise
from tests.helpers.grids import near, tiles
from tests.helpers.recipes import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import make_run

NAMES = ["Attribute_0", "Attribute_1", "Attribute_2"]
IMAGES = 25


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """In float64; latent groups 4x4_group00, 8x8_group00 and 8x8_group01."""
    folder, plain = tmp_path_factory.mktemp("runs"), tiny_settings("nowhere")
    plain["train"]["precision"] = "fp64"
    conditional = plain | {"condition": {"name": "attributes", "chosen": NAMES}}
    return {"plain": make_run(folder / "plain", plain), "attributes": make_run(folder / "attributes", conditional)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    samples = random_samples(30, 16, 16, attributes=3, seed=4)
    return write_set(tmp_path_factory.mktemp("shards") / "set", {"test": samples}, [20, 10])


def subject(trained, shards: Path, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A sample's image (1, 3, 16, 16), uint8, and its condition."""
    split = TarShards(shards, "test")
    x = torch.from_numpy(split.images([index]).transpose(0, 3, 1, 2).copy())
    if trained.recipe.condition is None:
        return x, None
    attributes = torch.from_numpy(split.attributes([index])).double()
    return x, torch.where(attributes < 0, 0.5, attributes)


@torch.no_grad()
def inferred(trained, x: torch.Tensor, condition: torch.Tensor | None) -> tuple[list, list, list, list]:
    """z, e, mu and sigma of each group: posterior means, and their priors given them."""
    zeros = [torch.zeros(1, *group.shape, dtype=torch.float64) for group in trained.model.groups]
    _, found = trained.model.infer(to_model_input(x, dtype=torch.float64), zeros, condition)
    z, mu, sigma = ([f.z for f in found], [f.prior.mean for f in found], [f.prior.sigma for f in found])
    return z, [(a - m) / s for a, m, s in zip(z, mu, sigma, strict=True)], mu, sigma


# ------------------------------------------------------------------------------------------------------- first groups


@pytest.mark.parametrize("kind", ["plain", "attributes"])
@torch.no_grad()
def test_reconstructions_from_each_number_of_groups(runs, shards, tmp_path, kind):
    out, trained = tmp_path / "out.png", pipeline.load(runs[kind], device="cpu")
    words = ["--data", str(shards), "--key", "3", "8", "--keep-groups"]
    assert main([str(runs[kind]), *words, "--device", "cpu", "--out", str(out)]) == 0
    for row, index in zip(tiles(out, 5), (3, 8), strict=True):
        x, condition = subject(trained, shards, index)
        z, *_ = inferred(trained, x, condition)
        zeros = [torch.zeros_like(group) for group in z]
        assert torch.equal(row[0], x[0])
        for count in range(4):
            near(row[1 + count], to_uint8(trained.model.sample(zeros, 1.0, condition, z[:count]))[0])
        near(row[4], to_uint8(trained.model.decode(z, condition))[0])


@torch.no_grad()
def test_groups_that_are_not_kept_can_be_sampled(runs, shards, tmp_path):
    out, trained = tmp_path / "out.png", pipeline.load(runs["plain"], device="cpu")
    words = ["--data", str(shards), "--key", "3", "8", "--keep-groups", "4x4", "8x8_group00", "--device", "cpu"]
    temperature = ["--temperature", "8x8_group01=0.5", "--seed", "9"]
    assert main([str(runs["plain"]), *words, *temperature, "--out", str(out)]) == 0
    for i, (row, index) in enumerate(zip(tiles(out, 3), (3, 8), strict=True)):
        x, _ = subject(trained, shards, index)
        z, *_ = inferred(trained, x, None)
        noise = draw_noise(trained.model.groups, 9, "sample", [i], dtype=torch.float64)
        for tile, count in zip(row[1:], (1, 2), strict=True):
            near(tile, to_uint8(trained.model.sample(noise, [1.0, 1.0, 0.5], None, z[:count]))[0])


# ----------------------------------------------------------------------------------------------- principal directions


@pytest.mark.parametrize(
    ("kind", "group", "temperature"),
    [("plain", 0, None), ("plain", 1, "0"), ("attributes", 1, "8x8=0.5"), ("plain", 2, None)],
)
@torch.no_grad()
def test_a_group_is_moved_along_its_principal_directions(runs, shards, tmp_path, kind, group, temperature):
    """e image by image, their covariance by NumPy; the moved latent by its formula, the later ones from their e."""
    out, trained = tmp_path / "out.png", pipeline.load(runs[kind], device="cpu")
    name = trained.model.groups[group].name
    words = ["--data", str(shards), "--key", "29", "--traverse", name, "--images", str(IMAGES), "--directions", "2"]
    words += ["--strength=-2,0,1.5", *(["--temperature", temperature] if temperature else [])]
    assert main([str(runs[kind]), *words, "--device", "cpu", "--out", str(out)]) == 0
    rows = np.stack(
        [inferred(trained, *subject(trained, shards, i))[1][group].flatten().numpy() for i in range(IMAGES)]
    )
    variances, vectors = np.linalg.eigh(np.cov(rows.T))
    x, condition = subject(trained, shards, 29)
    z, e, mu, sigma = inferred(trained, x, condition)
    later = {None: 1.0, "0": 0.0, "8x8=0.5": 0.5}[temperature]
    found = tiles(out, 4)
    assert len(found) == 2
    made = find_directions(trained, TarShards(shards, "test"), group, 2, IMAGES)
    strengths = torch.tensor([-2, 0, 1.5])
    images = traversed(trained, Subject("29", x, condition), group, made, strengths, later)
    for d, row in enumerate(found, start=1):
        vector = torch.from_numpy(vectors[:, -d]).view_as(z[group])
        vector = vector * vector.flatten()[vector.flatten().abs().argmax()].sign()
        assert torch.equal(row[0], x[0])
        for tile, image, strength in zip(row[1:], images[d - 1], strengths.tolist(), strict=True):
            moved = mu[group] + sigma[group] * (e[group] + strength * variances[-d] ** 0.5 * vector)
            noise = [later * part for part in e]
            expected = trained.model.sample(noise, 1.0, condition, [*z[:group], moved])
            torch.testing.assert_close(image[None], expected, rtol=0, atol=1e-9)
            near(tile, to_uint8(expected)[0])
    if temperature is None:
        near(found[0, 2], to_uint8(trained.model.decode(z, condition))[0])  # strength 0 is the reconstruction
    assert not torch.equal(found[0, 1], found[1, 1])


@torch.no_grad()
def test_the_groups_of_a_model_with_one_latent_vector(shards, tmp_path):
    """By class: the noise of a latent is the latent; the picture of no group is that of the prior's mean."""
    settings = tiny_settings("nowhere") | {"condition": {"name": "class", "num_classes": 10}}
    settings["model"] = {"name": "mlp_vae", "hidden": 16, "latent_size": 3, "likelihood": {"name": "normal"}}
    settings["regularizers"] = {"strength": 0.0}
    trained = pipeline.load(make_run(tmp_path / "run", settings), device="cpu")
    split = TarShards(shards, "test")
    x, labels = torch.from_numpy(split.images(range(20)).transpose(0, 3, 1, 2).copy()), split.labels(range(20))
    z = trained.encode(x, torch.from_numpy(labels), seed=None)[0].flatten(1).double().numpy()
    variances, vectors = np.linalg.eigh(np.cov(z.T))
    vector = vectors[:, -1] * np.sign(vectors[np.abs(vectors[:, -1]).argmax(), -1])
    common = [str(tmp_path / "run"), "--data", str(shards), "--key", "4", "--device", "cpu"]
    words = ["--traverse", "1x1", "--images", "20", "--directions", "1", "--strength=-1,2"]
    assert main([*common, *words, "--out", str(tmp_path / "moved.png")]) == 0
    (row,) = tiles(tmp_path / "moved.png", 3)
    for tile, strength in zip(row[1:], (-1, 2), strict=True):
        moved = torch.from_numpy(z[4] + strength * variances[-1] ** 0.5 * vector).float().view(1, 3, 1, 1)
        near(tile, to_uint8(trained.decode([moved], int(labels[4])))[0])
    assert main([*common, "--keep-groups", "--out", str(tmp_path / "kept.png")]) == 0
    (row,) = tiles(tmp_path / "kept.png", 3)
    for tile, latent in zip(row[1:], (np.zeros(3), z[4]), strict=True):
        latents = [torch.from_numpy(latent).float().view(1, 3, 1, 1)]
        near(tile, to_uint8(trained.decode(latents, int(labels[4])))[0])


# ---------------------------------------------------------------------------------------------------------- animations


def frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0  # without end
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]


def test_an_animation_shows_the_strip_forth_and_back(runs, shards, tmp_path):
    """WebP to the bit; GIF nearly, since its colors are limited."""
    out = tmp_path / "out.png"
    words = ["--data", str(shards), "--key", "3", "8", "--interpolate", "--steps", "5", "--frames", "5"]
    assert main([str(runs["plain"]), *words, "--gif", "--webp", "--out", str(out)]) == 0
    spherical = tiles(out, 7)[1, 1:6].permute(0, 2, 3, 1).numpy()  # without the originals
    expected = [spherical[i].repeat(16, axis=0).repeat(16, axis=1) for i in (0, 1, 2, 3, 4, 3, 2, 1)]
    for found, exact in zip(frames(tmp_path / "out.webp"), expected, strict=True):
        assert np.array_equal(found, exact)
    for found, exact in zip(frames(tmp_path / "out.gif"), expected, strict=True):
        assert np.abs(found.astype(int) - exact.astype(int)).mean() < 3
    with Image.open(tmp_path / "out.gif") as picture:
        shown = [frame.info["duration"] for frame in ImageSequence.Iterator(picture)]
    assert shown == [600, 60, 60, 60, 600, 60, 60, 60]


def test_gray_animations_are_exact_as_gif(tmp_path):
    settings = tiny_settings("nowhere")
    settings["data"]["channels"] = 1
    settings["model"]["likelihood"] = {"name": "bernoulli"}
    run = make_run(tmp_path / "run", settings)
    root = write_set(tmp_path / "set", {"test": random_samples(3, 16, 16, 1)}, [3])
    words = [str(run), "--data", str(root), "--key", "0", "2", "--interpolate", "--frames", "3"]
    assert main([*words, "--webp", "--out", str(tmp_path / "morph.gif")]) == 0
    assert sorted(path.name for path in tmp_path.glob("morph*")) == ["morph.gif", "morph.png", "morph.webp"]
    for one, other in zip(frames(tmp_path / "morph.gif"), frames(tmp_path / "morph.webp"), strict=True):
        assert np.array_equal(one, other)


def test_nothing_is_written_by_a_pillow_without_webp(runs, shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(features, "check", lambda name: False)
    words = ["--data", str(shards), "--key", "3", "8", "--interpolate", "--gif", "--webp"]
    assert main([str(runs["plain"]), *words, "--out", str(tmp_path / "out.png")]) == 2
    assert "out.webp: this Pillow was built without WebP; write a .gif" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


BAD = {
    "too many groups": (
        ["--keep-groups", "2", "4"],
        "--keep-groups 4: give a number from 0 to 3, a resolution or a group",
    ),
    "no such group": (["--traverse", "8x8"], "--traverse 8x8: give one of the groups 4x4_group00, 8x8_group00 to 8x8"),
    "two actions": (["--traverse", "4x4", "--keep-groups"], "give one of --set NAME=1, --interpolate, --keep-groups"),
    "no directions": (["--traverse", "4x4", "--directions", "0"], "--directions 0: must be at least 1"),
    "more directions than images": (
        ["--traverse", "4x4", "--directions", "3", "--images", "3"],
        "--directions 3: 3 images have at most 2; read more with --images",
    ),
    "a temperature of nothing": (
        ["--interpolate", "--temperature", "1"],
        "--temperature: applies to --keep-groups and",
    ),
    "a temperature that is none": (["--keep-groups", "--temperature", "hot"], "--temperature hot: give a number"),
    "a scale that is not": (["--keep-groups", "--temperature", "2x2=1"], "temperature: 2x2 is not known"),
    "nothing to animate": (["--keep-groups", "--gif"], "--gif, --webp: only --interpolate is animated"),
    "one frame": (["--interpolate", "--gif", "--frames", "1"], "--frames 1: must be at least 2"),
    "a negative seed": (["--keep-groups", "--seed", "-1"], "--seed -1: must be from 0 to 2^63 - 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_arguments_get_one_line_and_exit_code_2(runs, shards, tmp_path, capfd, what):
    words, message = BAD[what]
    out = ["--data", str(shards), "--key", "1", "--out", str(tmp_path / "out.png")]
    assert main([str(runs["plain"]), *words, *(out + ["--key", "1", "2"] if "--interpolate" in words else out)]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_directions_need_data(runs, tmp_path, capfd):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "face.png")
    assert main([str(runs["plain"]), "--image", str(tmp_path / "face.png"), "--traverse", "4x4"]) == 2
    assert "--traverse: give a shard set with --data DIR; the directions are those of" in capfd.readouterr().err


def test_the_default_name_describes_what_was_done(runs, shards):
    words = [str(runs["plain"]), "--data", str(shards), "--key", "1"]
    assert main([*words, "--keep-groups", "0", "4x4"]) == 0
    assert main([*words, "--traverse", "4x4_group00", "--images", "5", "--directions", "1"]) == 0
    names = {path.name for path in (runs["plain"] / "edited").iterdir()}
    assert names == {"test-s00001_first_groups_0_4x4.png", "test-s00001_4x4_group00_directions.png"}
