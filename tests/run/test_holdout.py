"""Runs with data.holdout: the best checkpoint is chosen on held-out training images, and never on the test set."""

import json
import shutil

import pytest
import yaml

from pipeline.config import build, overlay
from pipeline.data.holdout import open_split
from pipeline.data.loader import DataConfig
from pipeline.evaluate import build_parser, build_request, evaluate
from pipeline.recipe import Recipe
from pipeline.run.announce import first_lines
from pipeline.run.data import RunData
from pipeline.run.resume import ResumeRefused, choose_checkpoint, restore
from pipeline.run.session import Session
from pipeline.run.start_facts import start_facts
from pipeline.tracking.tracker import Tracker
from tests.helpers.launching import train as launch_training
from tests.helpers.model_cases import MLP
from tests.helpers.recipes import tiny_settings, write_tiny_set
from tests.helpers.run_folders import assert_metrics_close, metrics, read_lines
from tests.helpers.shard_sets import random_samples, write_set

WORDS = ("train.steps=4", "train.precision=fp64", "validation.every=2", "checkpoint.every=2", "samples.every=0")
HELD_OUT = ("data.holdout=9", "validation.split=val", "data.trace=true", "train.seed=3")


def tiny_recipe(root, *words: str) -> dict:
    """An MLP's settings for the tiny set, of which no split is `val`."""
    settings = tiny_settings(root) | {"model": dict(MLP)}
    return overlay(settings, ("train.batch_size=12", "tracking.log_every=1", "regularizers.strength=0", *WORDS, *words))


@pytest.fixture
def open_session(tiny_set, make_runtime):
    """(folder, words, resume) -> the session, resumed where the folder has a checkpoint."""

    def run(folder, *words: str, resume: str = "auto") -> Session:
        session = Session(build(Recipe, tiny_recipe(tiny_set, *words)), make_runtime("fp64"), folder)
        checkpoint = choose_checkpoint(session.checkpoints, resume)
        if checkpoint is not None:
            restore(session, checkpoint, resume)
        return session

    return run


@pytest.fixture
def train(open_session):
    """(folder, words) -> the session after training in `folder`."""

    def run(folder, *words: str) -> Session:
        session = open_session(folder, *words)
        with Tracker(session.recipe.tracking, folder, session.settings, is_main=True, start_step=0) as tracker:
            session.run(tracker)
        return session

    return run


def evaluated(runtime, folder, out, *words: str) -> dict:
    arguments = [str(folder), "--out", str(out), "--precision", "fp64", *words]
    evaluate(build_request(build_parser().parse_args(arguments)), runtime)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_one_process_and_two_validate_on_the_share_and_never_train_on_it(train, make_runtime, tiny_set, tmp_path):
    alone = train(tmp_path / "1", *HELD_OUT)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tiny_set, *HELD_OUT)))
    result = launch_training(2, recipe, "--run-dir", str(tmp_path / "2"))
    assert result.returncode == 0, result.stderr
    assert "9 of the 41 training images are held out" in result.stderr
    assert_metrics_close(metrics(tmp_path / "1"), metrics(tmp_path / "2"), tolerance=1e-9)
    traces = [read_lines(tmp_path / name / "data_trace.jsonl") for name in ("1", "2")]
    assert traces[0] == traces[1]
    held_out = open_split(tiny_set, "val", DataConfig(holdout=9), 3, verify=True, origin=None).keys(range(9))
    seen = {key for line in traces[0] for key in line["keys"]}
    assert len(seen) == 32  # all others, in 48 draws
    assert not seen & set(held_out)
    best = alone.checkpoints.best()
    assert best.score == -max(line["val/elbo"] for line in metrics(tmp_path / "1") if "val/elbo" in line)
    assert best.facts["holdout"]["count"] == 9

    report = evaluated(make_runtime("fp64"), tmp_path / "2", tmp_path / "out.json", "--split", "val")
    assert report["images"] == 9
    assert report["figures"]["elbo"] == pytest.approx(metrics(tmp_path / "1")[-1]["val/elbo"], rel=1e-9)
    report = evaluated(make_runtime("fp64"), tmp_path / "2", tmp_path / "train.json", "--split", "train")
    assert report["images"] == 32
    assert evaluated(make_runtime("fp64"), tmp_path / "2", tmp_path / "test.json")["images"] == 13


def test_val_of_another_set_is_refused(train, make_runtime, tmp_path):
    train(tmp_path / "run", *HELD_OUT, "validation.every=0", "train.steps=1")
    other = write_tiny_set(tmp_path / "other", train_seed=8)
    with pytest.raises(ValueError, match=rf"--split val: .* and {other} is another set"):
        evaluated(make_runtime("fp64"), tmp_path / "run", tmp_path / "x.json", "--split", "val", "--data", str(other))
    report = evaluated(make_runtime("fp64"), tmp_path / "run", tmp_path / "x.json", "--split", "train", "--data",
                       str(other))  # fmt: skip
    assert report["images"] == 41


def test_a_copy_of_the_set_has_the_same_share(train, make_runtime, tiny_set, tmp_path):
    """Named by another path, the training split is without the held-out images, too."""
    train(tmp_path / "run", *HELD_OUT, "validation.every=0", "train.steps=1")
    copy = shutil.copytree(tiny_set, tmp_path / "copy")
    for root in (f"{tiny_set}/", str(copy)):
        report = evaluated(make_runtime("fp64"), tmp_path / "run", tmp_path / "x.json", "--split", "train", "--data",
                           root)  # fmt: skip
        assert (report["images"], report["data"]["holdout"]["count"]) == (32, 9)


def test_another_set_is_evaluated_on_its_own_val(train, make_runtime, tmp_path):
    train(tmp_path / "run", *HELD_OUT, "validation.every=0", "train.steps=1")
    splits = {"val": random_samples(5, 16, 16, seed=2), "test": random_samples(3, 16, 16, seed=3)}
    other = write_set(tmp_path / "other", splits, [5])
    report = evaluated(make_runtime("fp64"), tmp_path / "run", tmp_path / "x.json", "--split", "val", "--data",
                       str(other))  # fmt: skip
    assert report["images"] == 5


def test_the_test_set_chooses_no_best_checkpoint(train, open_session, tmp_path):
    session = train(tmp_path / "test")
    assert session.checkpoints.best() is None
    lines = first_lines(session, start_facts(session, 1))
    (line,) = [line for line in lines if line.startswith("  best ")]
    assert "none is kept, since validation.split=test; data.holdout=N validation.split=val keeps one" in line
    assert len(line) <= 100
    assert len(lines) <= 8  # with the line that names the processes, and W&B's, ten
    for words in (("validation.every=0",), HELD_OUT):
        other = open_session(tmp_path / words[0], *words)
        assert "  best " not in "\n".join(first_lines(other, start_facts(other, 1)))
    with pytest.raises(ValueError, match="no checkpoint that could be its best"):
        session.checkpoints.load("best")


def test_a_resumed_run_keeps_its_share(train, open_session, tmp_path):
    train(tmp_path, *HELD_OUT, "validation.every=0", "train.steps=1")
    for resume in ("auto", "changed"):
        assert open_session(tmp_path, *HELD_OUT, "train.steps=2", resume=resume).trainer.step == 1
        for words in (("data.holdout=10",), ("data.holdout=0", "validation.split=test"), ("train.seed=4",)):
            with pytest.raises(ResumeRefused, match=r"data\.holdout|train\.seed"):
                open_session(tmp_path, *HELD_OUT, "train.steps=2", *words, resume=resume)


def test_the_data_of_a_recipe_say_what_does_not_fit(tiny_set, make_runtime):
    recipe = build(Recipe, tiny_recipe(tiny_set, "data.holdout=9"))
    with pytest.raises(ValueError, match=r"data\.holdout=9: validation\.split is 'test'"):
        RunData(recipe, make_runtime())
