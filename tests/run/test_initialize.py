"""`--init`: a new run from the weights of a checkpoint."""

import logging

import pytest
import torch

from pipeline.recipe import Recipe
from pipeline.run.initialize import initialize
from pipeline.run.session import Session
from pipeline.storage.checkpoint import Checkpoint, Checkpoints
from tests.helpers.trained_runs import STEP, make_run


@pytest.fixture
def source(tmp_path, settings) -> Checkpoint:
    """Of a run whose averaged weights differ from its weights."""
    return Checkpoints(make_run(tmp_path / "source", settings) / "checkpoints").load("latest")


@pytest.fixture
def start(make_recipe, make_runtime, tmp_path):
    """(overrides) -> a session at step 0."""

    def make(*overrides: str) -> Session:
        recipe: Recipe = make_recipe(*overrides)
        return Session(recipe, make_runtime(recipe.train.precision), tmp_path / "run")

    return make


def test_a_run_starts_at_step_0_with_the_averaged_weights(source, start):
    session = start("optim.name=adamw", "optim.lr=0.005", "train.seed=4")
    initialize(session, source)
    assert (session.trainer.step, source.step) == (0, STEP)
    tensors = session.trainer.state.tensors()
    for name, tensor in source.tensors["ema"].items():
        assert torch.equal(tensors["model"][name], tensor), name
        assert torch.equal(tensors["ema"][name], tensor), name
    assert tensors["optimizer"] == tensors["regularizers"] == {}


def test_a_float32_run_continues_in_float64(source, start):
    session = start("train.precision=fp64")
    initialize(session, source)
    for name, tensor in session.trainer.model.state_dict().items():
        assert tensor.dtype != torch.float32
        assert torch.equal(tensor, source.tensors["ema"][name].to(tensor.dtype)), name


def test_what_does_not_fit_is_listed_and_stays(source, start, caplog, monkeypatch):
    """Another number of latent channels: some layers have other shapes."""
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    session = start("model.latent_channels=3", "model.num_flows=0")
    before = {name: tensor.clone() for name, tensor in session.trainer.model.state_dict().items()}
    initialize(session, source)
    after, given = session.trainer.model.state_dict(), source.tensors["ema"]
    unfit = {name for name in before if name not in given or given[name].shape != before[name].shape}
    assert 0 < len(unfit) < len(before)
    assert all(torch.equal(after[name], before[name] if name in unfit else given[name]) for name in before)
    assert all(name in caplog.text for name in sorted(unfit)[:20])
    unused = given.keys() - before.keys()
    assert unused
    assert f"{len(unfit)} tensors are initialized at random" in caplog.text
    assert f"{len(unused | unfit & given.keys())} tensors are not loaded" in caplog.text


def test_a_checkpoint_of_which_nothing_fits_is_refused(source, start):
    source.tensors["ema"] = {"other": torch.zeros(1)}
    with pytest.raises(ValueError, match="no tensor of .* has the name and shape"):
        initialize(start(), source)


def test_weights_that_are_not_finite_are_refused(source, start):
    name = next(name for name, tensor in source.tensors["ema"].items() if tensor.is_floating_point())
    source.tensors["ema"][name].view(-1)[0] = torch.nan
    session = start()
    before = [parameter.clone() for parameter in session.trainer.model.parameters()]
    with pytest.raises(ValueError, match="non-finite"):
        initialize(session, source)
    assert all(map(torch.equal, before, session.trainer.model.parameters()))
