"""A checkpoint whose tensors do not fit the run is refused by name, before anything is loaded."""

import pytest
import torch

from pipeline.storage.checkpoint import Checkpoints
from pipeline.training.progress import Progress
from tests.helpers.model_cases import CASES, make_recipe, make_trainer, write_data


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def trained(root, runtime, *overrides, case="nvae", steps=2):
    """A trainer after some steps, with a moving average."""
    trainer = make_trainer(make_recipe(case, root, "train.ema_decay=0.9", *overrides), runtime)
    stream = iter(trainer.data.batches(0))
    for step in range(steps):
        assert trainer.train_step(step, [next(stream)]) is None
        trainer.progress.step += 1
    return trainer


@pytest.fixture
def trainer(labelled, make_runtime):
    return trained(labelled, make_runtime("fp32"))


def copied(tensors):
    return {stem: {name: tensor.clone() for name, tensor in group.items()} for stem, group in tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_expected_tensors_are_those_that_training_makes(case, labelled, make_runtime):
    trainer = trained(labelled, make_runtime("fp32"), case=case, steps=0)
    assert facts_of(trainer.state.tensors()) == facts_of(trainer.state.expected(updates=0))
    assert trainer.train_step(0, [next(iter(trainer.data.batches(0)))]) is None
    assert facts_of(trainer.state.tensors()) == facts_of(trainer.state.expected(updates=1))


@pytest.mark.parametrize("name", ["adamax", "adam", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_each_optimizer_has_the_expected_tensors(labelled, make_runtime, name, precision):
    overrides = (f"optim.name={name}", f"train.precision={precision}", "regularizers.strength=0.1")
    state = trained(labelled, make_runtime(precision), *overrides).state
    assert facts_of(state.tensors()) == facts_of(state.expected(updates=2))


def facts_of(tensors):
    return {
        stem: {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in group.items()}
        for stem, group in tensors.items()
    }


def moment(tensors):
    return next(name for name, tensor in tensors["optimizer"].items() if name.endswith("exp_avg") and tensor.ndim == 4)


def weight(tensors):
    return next(name for name, tensor in tensors["model"].items() if tensor.ndim == 4)


def wrong_shape(tensors):
    name = moment(tensors)
    tensors["optimizer"][name] = torch.zeros(3)
    return "optimizer", name, r"has shape \(3,\) instead of"


def wrong_dtype(tensors):
    name = weight(tensors)
    tensors["model"][name] = tensors["model"][name].double()
    return "model", name, "has dtype float64 instead of float32"


def wrong_moment_dtype(tensors):
    name = moment(tensors)
    tensors["optimizer"][name] = tensors["optimizer"][name].half()
    return "optimizer", name, "has dtype float16 instead of float32"


def missing(tensors):
    name = weight(tensors)
    del tensors["ema"][name]
    return "ema", name, "is missing"


def half_empty(tensors):
    name = moment(tensors)
    parameter = name.rpartition("/")[0]
    tensors["optimizer"] = {
        each: tensor for each, tensor in tensors["optimizer"].items() if not each.startswith(f"{parameter}/")
    }
    return "optimizer", name, "is missing"


def empty(tensors):
    name = next(iter(tensors["optimizer"])).rpartition("/")[0]
    tensors["optimizer"] = {}
    return "optimizer", name, "is missing"


def extra(tensors):
    tensors["optimizer"]["elsewhere.weight/exp_avg"] = torch.zeros(3)
    return "optimizer", "elsewhere.weight/exp_avg", "is unknown"


def not_a_number(tensors):
    name = weight(tensors)
    tensors["ema"][name][-1, -1, -1, -1] = torch.nan
    return "ema", name, "has non-finite values"


def infinite_moment(tensors):
    name = moment(tensors)
    tensors["optimizer"][name][0, 0, 0, 0] = torch.inf
    return "optimizer", name, "has non-finite values"


def no_vectors(tensors):
    name = next(iter(tensors["regularizers"]))
    tensors["regularizers"] = {}
    return "regularizers", name, "is missing"


FORGERIES = [wrong_shape, wrong_dtype, wrong_moment_dtype, missing, half_empty, empty, extra, not_a_number]
FORGERIES += [infinite_moment, no_vectors]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_checkpoint_is_refused_before_anything_is_loaded(trainer, labelled, make_runtime, tmp_path, forgery):
    """All its hashes are correct."""
    tensors = copied(trainer.state.tensors())
    file, name, problem = forgery(tensors)
    saved = Checkpoints(tmp_path).save(2, tensors, {"progress": trainer.counters()})
    found = Checkpoints(tmp_path).load(saved)
    other = trained(labelled, make_runtime("fp32"), "train.seed=9", steps=1)
    before = copied(other.state.tensors())
    with pytest.raises(ValueError, match=f"(?s){file}.safetensors does not fit this run:.*{name}.*{problem}"):
        other.resume(Progress.read(found.facts["progress"], 2), found.tensors)
    after = other.state.tensors()
    assert all(torch.equal(before[stem][each], after[stem][each]) for stem in before for each in before[stem])
    assert other.step == 1


def test_a_checkpoint_without_an_update_has_no_optimizer_state(trainer, labelled, make_runtime):
    """A run whose first steps were all skipped has none; one that states none but has some is refused."""
    fresh = trained(labelled, make_runtime("fp32"), steps=0)
    progress = Progress(step=3, skipped_steps=3, skipped_in_a_row=3)
    other = trained(labelled, make_runtime("fp32"), "train.seed=9", steps=0)
    other.resume(progress, copied(fresh.state.tensors()))
    assert (other.step, other.state.tensors()["optimizer"]) == (3, {})
    with pytest.raises(ValueError, match="optimizer.safetensors does not fit this run:.*\n.*is unknown"):
        other.resume(progress, copied(trainer.state.tensors()))


def test_few_of_many_tensors_are_named(trainer):
    tensors = copied(trainer.state.tensors())
    count = len(tensors["model"])
    tensors["model"] = {}
    with pytest.raises(ValueError, match=f"and {count - 5} more$"):
        trainer.resume(trainer.progress, tensors)
