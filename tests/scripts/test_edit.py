"""edit.py: the strips of edits and interpolations, inferred conditions, and wrong arguments."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from pipeline.data.shards import TarShards
from pipeline.edit import main, parse_strengths
from pipeline.evaluation.images import to_uint8
from pipeline.inference.editing import Subject, edit_by_condition, find_direction, find_sample, interpolate
from pipeline.inference.latents import spherical
from tests.helpers.command_lines import shown_facts
from tests.helpers.grids import near, pixels, tiles
from tests.helpers.recipes import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import make_run

NAMES = ["Attribute_0", "Attribute_1", "Attribute_2"]
CONDITIONS = {
    "plain": None,
    "classes": {"name": "class", "num_classes": 10},
    "attributes": {"name": "attributes", "chosen": NAMES, "exclusive": [NAMES[:2]]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    plain = tiny_settings("nowhere")
    return {
        name: make_run(folder / name, plain | ({"condition": condition} if condition else {}))
        for name, condition in CONDITIONS.items()
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_set(
        tmp_path_factory.mktemp("shards") / "set", {"test": random_samples(30, 16, 16, attributes=3, seed=4)}, [20, 10]
    )


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"face{i}.png")
    return [str(folder / f"face{i}.png") for i in range(2)]


# --------------------------------------------------------------------------------------------------------- the command


def test_a_strip_has_original_reconstruction_and_edits(runs, faces, tmp_path):
    """Two pictures, known attributes, a range of strengths: every tile is that of the Python interface."""
    known = "Attribute_0=1,Attribute_1=0,Attribute_2=0"
    words = ["--image", *faces, "--known", known, "--set", "Attribute_1=1", "--set", "Attribute_2=1"]
    out = tmp_path / "strip.png"
    assert main([str(runs["attributes"]), *words, "--strength", "0..1", "--steps", "3", "--out", str(out)]) == 0
    found = tiles(out, 5)
    trained = pipeline.load(runs["attributes"])
    start, half, end = [1.0, 0, 0], [0.5, 0.5, 0.5], [0.0, 1, 1]  # Attribute_1 clears its rival Attribute_0
    for row, face in zip(found, faces, strict=True):
        x = pixels(face)
        latents = trained.encode(x, torch.tensor(start), seed=None)
        assert torch.equal(row[0], x[0])
        near(row[1], to_uint8(trained.decode(latents, torch.tensor(start)))[0])
        for tile, condition in zip(row[2:], (start, half, end), strict=True):
            near(tile, to_uint8(trained.decode(latents, torch.tensor(condition)))[0])
    near(found[:, 1], found[:, 2])  # strength 0 is the reconstruction
    assert not torch.equal(found[0, 2], found[0, 4])


def test_a_class_is_changed_for_another(runs, faces, tmp_path):
    out = tmp_path / "out.png"
    words = ["--image", faces[0], "--known", "2", "--set", "7", "--out", str(out)]
    assert main([str(runs["classes"]), *words]) == 0
    trained = pipeline.load(runs["classes"])
    latents = trained.encode(pixels(faces[0]), 2, seed=None)
    near(tiles(out, 3)[0, 2], to_uint8(trained.decode(latents, 7))[0])


def test_what_is_edited_and_what_was_written_is_said(runs, shards, faces, tmp_path, capfd):
    out = tmp_path / "out.gif"
    assert main([str(runs["plain"]), "--image", *faces, "--interpolate", "--steps", "2", "--out", str(out)]) == 0
    title, *lines = capfd.readouterr().err.splitlines()
    assert title == "interpolation of nvae at step 7 on cpu"
    facts = shown_facts(lines)
    assert facts["model"] == [f"{runs['plain']}/checkpoints/step_00000007, the moving average of the weights"]
    assert (facts["images"], facts["writes"]) == ([", ".join(faces)], [str(out)])
    assert [line.split()[2] for line in lines if line.startswith("written to ")] == [f"{tmp_path}/out.png", str(out)]
    keys = ["--data", str(shards), "--key", "1", "2", "3", "4", "--images", "9", "--out", str(out.with_suffix(".png"))]
    assert main([str(runs["plain"]), *keys, "--set", "Attribute_1=0", "--strength", "0,0.5"]) == 0
    title, *lines = capfd.readouterr().err.splitlines()
    facts = shown_facts(lines)
    assert title == "edits of nvae at step 7 on cpu"
    assert (facts["images"], facts["edit"]) == (["1, 2, 3 and 1 more"], ["Attribute_1=0; strength 0, 0.5"])
    assert facts["data"] == [f"{shards}, split test; 9 images at most for the directions"]


@pytest.mark.parametrize("value", [1, 0])
def test_latents_of_a_model_without_a_condition_are_moved_by_mean_differences(runs, shards, faces, tmp_path, value):
    out = tmp_path / "out.png"
    words = ["--image", faces[0], "--data", str(shards), "--images", "25", "--set", f"Attribute_1={value}"]
    assert main([str(runs["plain"]), *words, "--strength", "0,1.5", "--out", str(out)]) == 0
    trained, split = pipeline.load(runs["plain"]), TarShards(shards, "test")
    x = torch.from_numpy(split.images(range(25)).transpose(0, 3, 1, 2).copy())
    present = split.attributes(range(25))[:, 1]
    latents = trained.encode(x, seed=None)
    difference = [group[present == 1].mean(0) - group[present == 0].mean(0) for group in latents]
    start = trained.encode(pixels(faces[0]), seed=None)
    sign = 1.5 if value else -1.5
    expected = trained.decode([a + sign * b for a, b in zip(start, difference, strict=True)])
    found = tiles(out, 4)[0]
    near(found[3], to_uint8(expected)[0])
    near(found[2], found[1])
    assert not torch.equal(found[3], found[2])


def test_samples_of_a_set_have_their_own_attributes(runs, shards, tmp_path, caplog):
    out = tmp_path / "out.png"
    words = ["--data", str(shards), "--key", "test-s00003", "8", "--set", "Attribute_2=1", "--out", str(out)]
    assert main([str(runs["attributes"]), *words]) == 0
    split, trained = TarShards(shards, "test"), pipeline.load(runs["attributes"])
    for row, index in zip(tiles(out, 3), (3, 8), strict=True):
        x = torch.from_numpy(split.images([index]).transpose(0, 3, 1, 2).copy())
        condition = torch.from_numpy(split.attributes([index])).float()
        condition[condition < 0] = 0.5
        assert torch.equal(row[0], x[0])
        near(row[1], to_uint8(trained.reconstruct(x, condition, seed=None))[0])


def test_interpolation_between_two_pictures(runs, faces, tmp_path):
    out = tmp_path / "out.png"
    assert main([str(runs["plain"]), "--image", *faces, "--interpolate", "--steps", "4", "--out", str(out)]) == 0
    found = tiles(out, 6)
    trained = pipeline.load(runs["plain"])
    a, b = (trained.encode(pixels(face), seed=None) for face in faces)
    for row in found:
        assert torch.equal(row[0], pixels(faces[0])[0])
        assert torch.equal(row[5], pixels(faces[1])[0])
        near(row[1], to_uint8(trained.decode(a))[0])
        near(row[4], to_uint8(trained.decode(b))[0])
    third = torch.tensor([1 / 3])
    near(found[0, 2], to_uint8(trained.decode([2 / 3 * x + 1 / 3 * y for x, y in zip(a, b, strict=True)]))[0])
    near(found[1, 2], to_uint8(trained.decode(spherical(a, b, third)))[0])
    assert not torch.equal(found[0, 2], found[1, 2])


def test_the_condition_is_interpolated_too(runs):
    trained = pipeline.load(runs["classes"])
    x = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    ends = [Subject("x", x[i : i + 1], trained.condition(i, 1)) for i in range(2)]
    for way in interpolate(trained, *ends, steps=3):
        torch.testing.assert_close(way[:1], trained.reconstruct(x[:1], 0, seed=None), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(way[2:], trained.reconstruct(x[1:], 1, seed=None), rtol=1e-4, atol=1e-5)


def test_the_default_name_describes_the_edit(runs, faces):
    assert main([str(runs["classes"]), "--image", faces[0], "--known", "1", "--set", "3"]) == 0
    assert [path.name for path in (runs["classes"] / "edited").iterdir()] == ["face0_3.png"]


BAD = {
    "two classes": ("classes", ["--image", "FACE", "--set", "1", "--set", "2"], "1, 2: a picture has one class"),
    "what is known already": (
        "attributes",
        ["--data", "SHARDS", "--key", "1", "--known", "Attribute_1=1", "--set", "Attribute_1=0"],
        "--known: applies to pictures of --image",
    ),
    "a strength of nothing": (
        "plain",
        ["--image", "FACE", "--keep-groups", "--strength", "0..1"],
        "--strength: applies to --set and --traverse",
    ),
    "a JPEG file": (
        "plain",
        ["--image", "FACE", "--keep-groups", "--out", "kept.jpg"],
        "--out kept.jpg: pictures are PNG files; name it kept.png",
    ),
    "nothing to edit": ("plain", ["--interpolate"], "give pictures with --image"),
    "nothing to do": (
        "plain",
        ["--image", "FACE"],
        "give one of --set NAME=1, --interpolate, --keep-groups",
    ),
    "two things": ("plain", ["--image", "FACE", "--interpolate", "--set", "a=1"], "give one of --set"),
    "one end": ("plain", ["--image", "FACE", "--interpolate"], "--interpolate: needs two pictures; 1 given"),
    "a key of nothing": ("plain", ["--key", "1", "--interpolate"], "--key: give the shard set"),
    "no such key": (
        "attributes",
        ["--data", "SHARDS", "--key", "x", "--set", "Attribute_1=1"],
        "keys are like test-s00000",
    ),
    "a number too high": (
        "attributes",
        ["--data", "SHARDS", "--key", "30", "--set", "Attribute_1=1"],
        "numbers are 0 to 29",
    ),
    "no such split": (
        "attributes",
        ["--data", "SHARDS", "--split", "dev", "--key", "1", "--set", "Attribute_1=1"],
        "no split 'dev'; it has: test",
    ),
    "no directions": ("plain", ["--image", "FACE", "--set", "Attribute_1=1"], "give --data DIR"),
    "a direction that is not": (
        "plain",
        ["--image", "FACE", "--data", "SHARDS", "--set", "Smiling=1"],
        "Known: Attribute_0",
    ),
    "an attribute that is no number": (
        "plain",
        ["--image", "FACE", "--data", "SHARDS", "--set", "Attribute_1=nan"],
        "attribute Attribute_1=nan: a strength is from 0 (absent) to 1 (present)",
    ),
    "too few for a direction": (
        "plain",
        ["--image", "FACE", "--data", "SHARDS", "--images", "1", "--set", "Attribute_1=1"],
        "both are needed; read more with --images",
    ),
    "an attribute that is not": (
        "attributes",
        ["--image", "FACE", "--set", "Smiling=1"],
        "Known: Attribute_0, Attribute_1",
    ),
    "a known one that is not": (
        "attributes",
        ["--image", "FACE", "--known", "Smiling=1", "--set", "Attribute_1=1"],
        "Smiling is not known",
    ),
    "a class that is not": ("classes", ["--image", "FACE", "--set", "10"], "class 10 is not known; known: 0, 1"),
    "something known to nobody": ("plain", ["--image", "FACE", "--known", "1", "--set", "a=1"], "without a condition"),
    "too strong": (
        "attributes",
        ["--image", "FACE", "--set", "Attribute_1=1", "--strength", "2"],
        "from 0 (unchanged) to 1",
    ),
    "no strength": ("plain", ["--image", "FACE", "--set", "a=1", "--data", "SHARDS", "--strength", "much"], "0,0.5,1"),
    "an endless strength": (
        "plain",
        ["--image", "FACE", "--set", "Attribute_1=1", "--data", "SHARDS", "--strength", "inf"],
        "--strength inf: must be finite",
    ),
    "rivals": (
        "attributes",
        ["--image", "FACE", "--set", "Attribute_0=1", "--set", "Attribute_1=1"],
        "exclude each other",
    ),
    "no picture": ("plain", ["--image", "nowhere.png", "FACE", "--interpolate"], "nowhere.png: no such picture"),
    "no run": ("nowhere", ["--image", "FACE", "--set", "a=1"], "no such folder; give the folder of a run"),
    "one step": (
        "plain",
        ["--image", "FACE", "FACE", "--interpolate", "--steps", "1"],
        "must be at least 2",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_arguments_get_one_line_and_exit_code_2(runs, faces, shards, tmp_path, capfd, what):
    kind, words, message = BAD[what]
    places = {"FACE": faces[0], "SHARDS": str(shards)}
    words = [places.get(word, word) for word in words]
    assert main([str(runs.get(kind, tmp_path / kind)), "--out", str(tmp_path / "out.png"), *words]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out.png").exists()


def test_a_set_without_attributes_is_named(runs, faces, tmp_path, capfd):
    digits = write_set(tmp_path / "digits", {"test": random_samples(4, 16, 16, seed=4)}, [4])
    assert main([str(runs["plain"]), "--image", faces[0], "--data", str(digits), "--set", "Smiling=1"]) == 2
    assert f"attribute of {digits}: Smiling is not known. Known: none" in capfd.readouterr().err


def test_strengths_as_users_write_them():
    assert parse_strengths("0..1", 3).tolist() == [0, 0.5, 1]
    assert parse_strengths("-1..1", 3).tolist() == [-1, 0, 1]
    assert parse_strengths("0.25", 3).tolist() == [0.25]
    assert parse_strengths("1,0", 3).tolist() == [1, 0]


def test_a_sample_is_found_by_key_or_number(shards):
    split = TarShards(shards, "test")
    for index in (0, 7, 29):
        assert find_sample(split, split.keys([index])[0]) == find_sample(split, str(index)) == index


def test_hidden_and_unknown_attributes_do_not_count(runs, shards, monkeypatch):
    """In a direction: as if those images were not there."""
    trained, split = pipeline.load(runs["plain"]), TarShards(shards, "test")
    images, attributes = split.images(range(30)), split.attributes(range(30))
    attributes[:, 1] = np.arange(30) % 3 - 1
    keep = (np.arange(30) % 3 - 1 >= 0) & (np.arange(30) >= 4)
    hidden = np.zeros_like(attributes, bool)
    hidden[:4] = True
    monkeypatch.setattr(split, "attributes", lambda here: attributes[list(here)])
    monkeypatch.setattr(split, "hidden", lambda here: hidden[list(here)], raising=False)
    latents = trained.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), seed=None)
    for found, group in zip(find_direction(trained, split, {"Attribute_1": 1.0}, 30), latents, strict=True):
        with_it, without = (group[torch.from_numpy(keep & (attributes[:, 1] == value))] for value in (1, 0))
        torch.testing.assert_close(found[0], with_it.mean(0) - without.mean(0), rtol=1e-4, atol=1e-5)


def test_inferred_attributes_are_printed(runs, faces, tmp_path, capfd):
    words = [
        "--image",
        faces[0],
        "--known",
        "Attribute_0=1",
        "--set",
        "Attribute_2=1",
        "--out",
        str(tmp_path / "o.png"),
    ]
    assert main([str(runs["attributes"]), *words]) == 0
    assert re.search(r"face0.png: unchanged; inferred: (none|Attribute_2) of 2", capfd.readouterr().err)
    assert main([str(runs["classes"]), "--image", faces[0], "--set", "1", "--out", str(tmp_path / "o.png")]) == 0
    assert re.search(r"inferred: class \d", capfd.readouterr().err)


def test_strengths_of_conditions_have_ends(runs):
    trained = pipeline.load(runs["attributes"])
    subject = Subject("x", torch.zeros(1, 3, 16, 16).byte(), trained.condition({}, 1))
    with pytest.raises(ValueError, match="from 0"):
        edit_by_condition(trained, subject, ["Attribute_2=1"], torch.tensor([-0.1]))
