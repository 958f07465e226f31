"""Where a model can be, and where the tools write what they make of it."""

import json
import re
import shutil

import pytest
import torch

import pipeline
from pipeline import edit, evaluate, sample
from pipeline.inference.locations import find_model, results_folder
from pipeline.inference.model_folder import content_of, write_model_folder
from pipeline.storage.checkpoint import Checkpoints
from tests.helpers.recipes import tiny_settings
from tests.helpers.trained_runs import STEP, make_run

CHECKPOINT = f"checkpoints/step_{STEP:08d}"


@pytest.fixture(scope="module")
def made(shards, tmp_path_factory):
    """A folder with a run, `run`, and a model folder of its averaged weights, `model`."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder / "run", tiny_settings(shards))
    write_model_folder(folder / "model", content_of(Checkpoints(folder / "run/checkpoints").latest()), "")
    return folder


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """The current folder, with `run` and `model`."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize("place", ["run", f"run/{CHECKPOINT}", "model"])
def test_one_model_at_each_kind_of_place(made, place, prefix):
    expected = pipeline.load(made / "run").sample(2, seed=3)
    found = pipeline.load(f"{prefix}{made / place}")
    assert torch.equal(found.sample(2, seed=3), expected)
    assert found.step == STEP
    assert pipeline.load(found.place).weights_sha256 == found.weights_sha256


def test_the_place_names_one_checkpoint_of_a_run_that_is_still_trained(copy):
    place = find_model("run").place
    found = Checkpoints("run/checkpoints").latest()
    Checkpoints("run/checkpoints").save(STEP + 2, found.tensors, found.facts)
    assert find_model("run").checkpoint.step == STEP + 2
    assert find_model(place).checkpoint.step == STEP


@pytest.mark.parametrize("checkpoint", ["best", 7, "elsewhere"])
@pytest.mark.parametrize("place", ["model", f"run/{CHECKPOINT}"])
def test_a_checkpoint_is_chosen_of_a_run_only(made, place, checkpoint):
    with pytest.raises(ValueError, match=f"{place}: is one model; choose a checkpoint .here {checkpoint}. only"):
        pipeline.load(made / place, checkpoint)


NOTHING = {
    "alice/faces": "no such folder; give the folder of a run, or hf-hub:alice/faces for a model of the Hub",
    "run/more": "no such folder; give the folder of a run$",  # `run` is a folder here
    "local-dir:nowhere": "nowhere: no such folder",
    "hf-hub:faces": "'faces': a model of the Hub is OWNER/NAME, or OWNER/NAME@REVISION",
    "hf-hub:alice/faces@": "'alice/faces@': a model of the Hub is",
    "hf-hub:../faces": "'../faces': a model of the Hub is",
    "hf-hub:alice/faces@../../x": "a model of the Hub is",
    "hf-hub:alice/\x1b[2J": r"'alice/\?\[2J': a model of the Hub is",
    "hf-hub:": "'': a model of the Hub is",
}


@pytest.mark.parametrize("place", NOTHING)
def test_a_place_without_a_model_is_explained(copy, place):
    with pytest.raises(ValueError, match=NOTHING[place]):
        pipeline.load(place)


def test_results_lie_with_the_model():
    assert str(results_folder("runs/a")) == "runs/a"
    assert str(results_folder("local-dir:runs/a")) == "runs/a"
    assert str(results_folder(f"runs/a/{CHECKPOINT}")) == "runs/a"
    assert str(results_folder(f"elsewhere/step_{STEP:08d}")) == f"elsewhere/step_{STEP:08d}"
    assert str(results_folder("models/a")) == "models/a"
    assert str(results_folder("hf-hub:alice/faces@v1")) == "alice--faces"


@pytest.mark.parametrize(("place", "results"), [(f"run/{CHECKPOINT}", "run"), ("model", "model")])
def test_the_tools_take_any_place_and_write_there(copy, shards, make_runtime, place, results, capsys):
    make_runtime()
    assert evaluate.main([place, "--threads", "1", "--images", "1"]) == 0
    assert sample.main([place, "--count", "1"]) == 0
    assert edit.main([place, "--data", str(shards), "--key", "0", "1", "--interpolate", "--steps", "2"]) == 0
    (report,) = (copy / results / "evaluations").iterdir()
    assert json.loads(report.read_text())["checkpoint"] == place
    assert len(list((copy / results / "samples").iterdir())) == 1
    assert len(list((copy / results / "edited").iterdir())) == 1
    capsys.readouterr()
    assert evaluate.main([place, "--list"]) == 0
    assert re.fullmatch(rf"evaluations/{report.name}  elbo -?\d+.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("root", "message"), [("elsewhere/set", "elsewhere/set, the shard set"), (None, "names no data")]
)
def test_data_that_are_not_here_have_to_be_named(copy, make_runtime, capfd, root, message):
    """As for a model folder of someone else."""
    make_run(copy / "other", tiny_settings("x") | {"data": tiny_settings("x")["data"] | {"root": root}})
    make_runtime()
    assert evaluate.main(["other", "--threads", "1"]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "; name a shard set with --data DIR" in error


def test_a_list_of_evaluations_where_there_are_none(copy, capfd):
    assert evaluate.main(["model", "--list"]) == 0
    assert capfd.readouterr().out == "no evaluations in model\n"
    assert evaluate.main(["hf-hub:alice/faces", "--list"]) == 2
    assert "alice--faces: no such folder, so there are no evaluations of this model" in capfd.readouterr().err
