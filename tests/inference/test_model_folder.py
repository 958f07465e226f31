"""Model folders: written whole, equal bytes for equal content, and nothing in them trusted."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch

from pipeline.config import build, load_yaml
from pipeline.inference import model_folder
from pipeline.inference.model_folder import ModelContent, content_of, read_model_folder, write_model_folder
from pipeline.recipe import Recipe
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import read_folder, snapshot, write_folder
from tests.helpers.recipes import tiny_settings
from tests.helpers.trained_runs import STEP, make_run

FILES = ["README.md", "config.yaml", "meta.json", "model.safetensors", "samples.png"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), tiny_settings("nowhere"), fingerprint="f" * 64)


@pytest.fixture(scope="module")
def content(run) -> ModelContent:
    content = content_of(Checkpoints(run / "checkpoints").latest())
    return ModelContent(content.recipe, content.weights, content.step, {"source": {"kind": "run"}, **content.facts})


@pytest.fixture(scope="module")
def folder(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "model"
    write_model_folder(path, content, "# A card\n", np.full((4, 4, 3), 7, np.uint8))
    return path


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_written_is_what_is_read(folder, content):
    found = read_model_folder(folder)
    assert (found.recipe, found.step) == (content.recipe, STEP)
    assert found.facts == content.facts
    assert found.weights.keys() == content.weights.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in content.weights.items())
    assert sorted(contents(folder)) == FILES
    assert build(Recipe, load_yaml(folder / "config.yaml")) == content.recipe


def test_equal_content_gives_equal_bytes(folder, content, tmp_path):
    shuffled = dict(reversed(content.weights.items()))
    again = ModelContent(content.recipe, shuffled, content.step, content.facts)
    write_model_folder(tmp_path / "again", again, "# A card\n", np.full((4, 4, 3), 7, np.uint8))
    assert contents(tmp_path / "again") == contents(folder)


def test_the_weights_have_the_sha256_that_evaluations_of_the_run_state(folder, run):
    """So that a figure of the run is a figure of exactly these weights."""
    averaged = Checkpoints(run / "checkpoints").latest().sha256["ema"]
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == averaged


def test_without_a_picture_there_is_none(content, tmp_path):
    write_model_folder(tmp_path / "model", content, "")
    assert sorted(contents(tmp_path / "model")) == FILES[:-1]


def test_weights_of_another_model_are_not_written(content, tmp_path):
    name = next(iter(content.weights))
    weights = {**content.weights, name: torch.zeros(3)}
    with pytest.raises(ValueError, match=f"{name!r} has shape"):
        write_model_folder(tmp_path / "model", ModelContent(content.recipe, weights, 0, {}), "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("last", ["dump", "save_png"])
def test_a_folder_whose_writing_fails_is_not_there(content, tmp_path, monkeypatch, last):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, last, fail)
    with pytest.raises(OSError, match="model could not be written: No space left"):
        write_model_folder(tmp_path / "model", content, "", np.zeros((4, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- of someone else


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def refused(folder, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_model_folder(folder)


def test_changed_swapped_and_enlarged_weights_are_refused(copy, content, tmp_path):
    path = copy / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(copy, "model.safetensors: sha256 differs from the one in meta.json")
    with path.open("ab") as file:
        file.truncate(2**40)  # a sparse file
    refused(copy, f"model.safetensors: {2**40} bytes instead of {len(good)}")
    path.unlink()
    refused(copy, "model.safetensors: No such file")


def test_links_are_refused(copy, tmp_path):
    for name in ("model.safetensors", "meta.json"):
        (copy / name).rename(tmp_path / name)
        (copy / name).symlink_to(tmp_path / name)
        refused(copy, f"{name}: is a symbolic link")
        (copy / name).unlink()
        os.rename(tmp_path / name, copy / name)
    assert read_model_folder(copy)


FORGED = {
    "a forged setting": ({"train.from_the_future": 1}, "not those of this version of the pipeline"),
    "wide": ({"model.encoder_channels": 2**62}, "its settings"),
    "other widths": ({"model.encoder_channels": 64}, "does not fit"),
    "many groups": ({"model.groups_per_scale": [10**9]}, "its settings"),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_settings_with_valid_hashes_are_refused_before_memory_is_allocated(folder, tmp_path, what):
    changes, message = FORGED[what]
    found = read_folder(folder)
    for path, value in changes.items():
        section, _, key = path.partition(".")
        found.facts["settings"][section][key] = value
    write_folder(tmp_path / "model", snapshot(found.tensors), STEP, found.facts, None)
    refused(tmp_path / "model", message)


def test_a_checkpoint_without_a_model_is_refused(content, tmp_path):
    write_folder(tmp_path / "other", snapshot({"weights": content.weights}), STEP, dict(content.facts), None)
    refused(tmp_path / "other", "holds no model with its settings")
