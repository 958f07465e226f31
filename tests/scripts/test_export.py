"""export.py: from a run to a model folder that anyone can load, and what it does not give away."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image

import pipeline
from pipeline import evaluate, export
from pipeline.config import build
from pipeline.inference.export_run import publishable, shows_real_faces
from pipeline.recipe import Recipe
from pipeline.storage.checkpoint import Checkpoints
from tests.helpers.command_lines import shown_facts
from tests.helpers.launching import ROOT
from tests.helpers.recipes import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import STEP, make_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    splits = {"train": random_samples(20, 16, 16), "test": random_samples(5, 16, 16, seed=2)}
    return write_set(tmp_path_factory.mktemp("shards") / "flowers", splits, [20])


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    fingerprint = json.loads((shards / "manifest.json").read_text())["fingerprint"]
    private = {"tracking": {"entity": "alice", "name": "secret", "tags": ["grant"], "project": "ours"}}
    return make_run(tmp_path_factory.mktemp("run") / "run", tiny_settings(shards) | private, fingerprint=fingerprint)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_exported_run_is_loaded_by_the_code_of_its_card(run, here):
    assert export.main([str(run), "--out", "flowers", "--license", "mit"]) == 0
    assert names(here / "flowers") == ["README.md", "config.yaml", "meta.json", "model.safetensors", "samples.png"]
    card = (here / "flowers/README.md").read_text()
    given: dict = {}
    exec(re.search("```python\n(.*?)```", card, re.S)[1], given)
    original = pipeline.load(run)
    assert torch.equal(given["images"], original.sample(16, temperature=0.7, seed=1))
    assert (given["model"].averaged, given["model"].step) == (True, STEP)
    assert given["model"].weights_sha256 == original.weights_sha256
    assert Image.open("flowers/samples.png").size > (128, 128)


def test_what_is_exported_and_what_was_written_is_said(run, here, capfd):
    assert export.main([str(run), "--out", "flowers"]) == 0
    title, *lines = capfd.readouterr().err.splitlines()
    assert title == f"model folder of nvae at step {STEP} on cpu"
    facts = shown_facts(lines)
    assert facts["model"] == [f"{run}/checkpoints/step_{STEP:08d}, the moving average of the weights"]
    assert facts["writes"] == ["flowers"]
    written = ", ".join(names(here / "flowers"))
    assert lines[-1] == f"written to flowers: {written}; evaluations of these weights in its card: 0"


def test_equal_exports_are_equal_to_the_byte(run, here):
    for parent in ("a", "b"):
        assert export.main([str(run), "--out", f"{parent}/flowers"]) == 0
    contents = [{path.name: path.read_bytes() for path in (here / name / "flowers").iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1]


def test_figures_are_those_of_exactly_these_weights(run, shards, here, make_runtime):
    copy = shutil.copytree(run, here / "run")
    found = Checkpoints(copy / "checkpoints").latest()
    Checkpoints(copy / "checkpoints").save(STEP + 1, {"model": found.tensors["ema"]}, found.facts)  # the same weights
    Checkpoints(copy / "checkpoints").save(STEP + 2, {"model": found.tensors["model"]}, found.facts)
    for step, images in ((STEP, "4"), (STEP + 2, "3")):
        make_runtime()
        assert evaluate.main([str(copy), "--checkpoint", str(step), "--images", images, "--threads", "1"]) == 0
    (copy / "evaluations/broken.json").write_text("{")
    for step, shown, hidden in ((STEP, "`4` of `5`", "`3` of `5`"), (STEP + 2, "`3` of `5`", "`4` of `5`")):
        assert export.main([str(copy), "--checkpoint", str(step), "--out", f"model{step}", "--picture", "no"]) == 0
        card = (here / f"model{step}/README.md").read_text()
        assert shown in card
        assert hidden not in card
        assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert export.main([str(copy), "--checkpoint", str(STEP + 1), "--out", "same", "--picture", "no"]) == 0
    assert "`4` of `5`" in (here / "same/README.md").read_text()


def test_the_folder_gives_nothing_of_the_author_away(run, shards, here):
    assert export.main([str(run), "--out", "flowers"]) == 0
    text = b"".join(path.read_bytes() for path in (here / "flowers").iterdir() if path.suffix != ".png").decode(
        "latin1"
    )
    for secret in (str(shards), str(here), str(run), os.path.expanduser("~/"), "alice", "secret", "grant", "ours"):
        assert secret not in text
    assert yaml.safe_load((here / "flowers/config.yaml").read_text())["data"]["root"] == "data/flowers"


@pytest.mark.parametrize(
    ("given", "published"),
    [
        ("/home/alice/data/faces/", "data/faces"),
        ("../elsewhere/faces", "data/faces"),
        ("data/faces", "data/faces"),
        ("https://example.org/faces", "https://example.org/faces"),
    ],
)
def test_paths_become_names(given, published):
    assert publishable(build(Recipe, tiny_settings(given))).data.root == published


def test_a_model_folder_is_exported_again_as_it_was(run, here):
    assert export.main([str(run), "--out", "a", "--picture", "no"]) == 0
    assert export.main(["a", "--out", "b", "--picture", "no"]) == 0
    for name in ("meta.json", "model.safetensors", "config.yaml"):
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("source", "root", "expected"),
    [
        ("celeba --size 64 --source DIR", "data/set", True),
        (None, "/data/FFHQ256", True),
        ("toy_faces --size 32", "data/toy_faces32", False),
        ("mnist --source DIR", "data/mnist", False),
        (None, None, False),
    ],
)
def test_sets_of_real_faces_are_known(source, root, expected):
    settings = tiny_settings("x")
    settings["data"] |= {"source": source, "root": root}
    assert shows_real_faces(build(Recipe, settings), None) is expected


def test_no_picture_of_a_model_of_real_faces_unless_asked(run, shards, here, capfd):
    faces = make_run(
        here / "run", tiny_settings(shards) | {"data": tiny_settings(shards)["data"] | {"source": "celeba"}}
    )
    assert export.main([str(faces), "--out", "a"]) == 0
    assert (
        "no picture of samples, because the data set shows real people; --picture yes adds it" in capfd.readouterr().err
    )
    assert "samples.png" not in names(here / "a")
    assert "real people" in (here / "a/README.md").read_text()
    assert export.main([str(faces), "--out", "b", "--picture", "yes"]) == 0
    assert "samples.png" in names(here / "b")


def test_data_that_are_not_at_hand_are_not_described(run, shards, here, capfd):
    other = make_run(here / "other", tiny_settings(shards), fingerprint="f" * 64)
    assert export.main([str(other), "--out", "a", "--picture", "no"]) == 0
    assert "is another set than the one that was trained on" in capfd.readouterr().err
    unknown = make_run(here / "unknown", tiny_settings(shards))
    assert export.main([str(unknown), "--out", "c", "--picture", "no"]) == 0
    assert "the model does not state which shard set it is of" in capfd.readouterr().err
    gone = make_run(here / "gone", tiny_settings("nowhere"), fingerprint="f" * 64)
    assert export.main([str(gone), "--out", "b", "--picture", "no"]) == 0
    assert "the shard set cannot be read: nowhere: no such folder" in capfd.readouterr().err
    assert "Images by split" not in (here / "a/README.md").read_text() + (here / "b/README.md").read_text()


def test_a_run_that_is_still_trained_is_exported_at_its_newest_checkpoint(run, here):
    copy = shutil.copytree(run, here / "run")
    hidden = copy / "checkpoints/.step_00000009.elsewhere.1.writing"
    hidden.mkdir()
    (hidden / "model.safetensors").write_bytes(b"half")
    (copy / "status.json").write_text(
        json.dumps({"state": "running", "step": STEP, "total_steps": 50, "attempt": 1, "reason": "", "time": 0.0})
    )
    assert export.main([str(copy), "--out", "model", "--picture", "no"]) == 0
    assert f"- {STEP} of 50 optimizer steps" in (here / "model/README.md").read_text()


BAD = {
    "no folder": (["RUN"], "--out: name the folder to write"),
    "a full folder": (["RUN", "--out", "full"], "full is not empty; name a new folder"),
    "a file": (["RUN", "--out", "full/file"], "file is there and is not a folder"),
    "no run": (["nowhere", "--out", "new"], "nowhere: no such folder"),
    "a run without checkpoints": (["empty", "--out", "new"], "empty: no run with checkpoints there"),
    "no such step": (["RUN", "--out", "new", "--checkpoint", "99"], "no checkpoint of step 99; available steps: 7"),
    "no model to push": (["RUN", "--push", "alice/a"], "not a model folder with a card; name the folder to write"),
    "a bad name": (["RUN", "--out", "new", "--push", "alice"], "'alice': a model of the Hub is OWNER/NAME"),
    "a revision": (["RUN", "--out", "new", "--push", "a/b@v1"], "--push a/b@v1: name OWNER/NAME, without a revision"),
    "private": (["RUN", "--out", "new", "--private"], "--private: applies to --push"),
    "a license in words": (["RUN", "--out", "new", "--license", "My license"], "--license My license: give an id"),
    "half a license": (["RUN", "--out", "new", "--license", "other"], "--license other: goes with --license-name"),
    "another license": (["RUN", "--out", "new", "--license", "mit", "--license-name", "a"], "and only it does"),
    "a link": (["RUN", "--out", "new", "--license", "other", "--license-name", "a", "--license-link", "x"], "http(s)"),
    "a data set": (["RUN", "--out", "new", "--data-name", "a b"], "--data-name a b: give the id of a data set"),
    "no token": (["RUN", "--out", "new", "--push", "alice/a"], "hf-hub:alice/a: no token; log in"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_input_gets_one_line_and_writes_nothing(run, here, capfd, monkeypatch, what):
    words, message = BAD[what]
    monkeypatch.setattr("pipeline.inference.hub.get_token", lambda: None)
    (here / "full").mkdir()
    (here / "full/file").write_text("x")
    (here / "empty").mkdir()
    assert export.main([str(run) if word == "RUN" else word for word in words]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert names(here) == ["empty", "full"]
    assert names(here / "full") == ["file"]


INTERRUPTED = """
import os, sys, time
from pipeline.inference import export_run, model_folder

def slow(*arguments):
    print("writing", flush=True)
    time.sleep(60)

model_folder.dump = slow
sys.argv = ["export.py", *sys.argv[1:]]
from pipeline import export
sys.exit(export.main())
"""


@pytest.mark.parametrize(("kind", "code", "left"), [(signal.SIGINT, 130, 0), (signal.SIGKILL, -9, 1)])
def test_an_interrupted_export_leaves_no_folder(run, here, kind, code, left):
    """Interrupted when the weights are written. What a killed one leaves is hidden, and the next export removes it."""
    command = [sys.executable, "-c", INTERRUPTED, str(run), "--out", "model", "--picture", "no"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout.readline() == b"writing\n"
        time.sleep(0.1)
        process.send_signal(kind)
        assert process.wait(60) == code
    assert (
        len([name for name in names(here) if re.fullmatch(r"\.model\..*\.writing", name)]) == len(names(here)) == left
    )
    assert export.main([str(run), "--out", "model", "--picture", "no"]) == 0
    assert names(here) == ["model"]
