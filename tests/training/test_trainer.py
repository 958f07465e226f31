"""The training step: what a finite step does, and that a skipped one changes nothing."""

from itertools import islice

import pytest
import torch
from torch import Tensor

from pipeline.recipe import Recipe
from pipeline.run.build import build_trainer
from pipeline.run.data import RunData
from pipeline.tracking.meters import Throughput
from pipeline.training.progress import TrainingDiverged
from pipeline.training.trainer import Cadence, Trainer


@pytest.fixture
def make_trainer(make_recipe, make_runtime):
    """(overrides) -> a trainer of the tiny recipe."""

    def make(*overrides: str, precision: str = "fp32") -> Trainer:
        recipe: Recipe = make_recipe(*overrides, f"train.precision={precision}")
        runtime = make_runtime(precision)
        return build_trainer(recipe, runtime, RunData(recipe, runtime))

    return make


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{stem}/{name}": tensor.clone()
        for stem, part in trainer.state.tensors().items()
        for name, tensor in part.items()
    }


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    different = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert different == []


def take_step(trainer: Trainer, step: int) -> bool:
    """Whether it was not skipped."""
    batches = list(islice(iter(trainer.data.batches(step)), trainer.config.micro_batches))
    return trainer.train_step(step, batches) is None


def poison(trainer: Trainer, where: str) -> None:
    """Makes the next training step meet a NaN at one place, or a gradient that is too large."""
    if where == "norm":
        trainer.gradients.skip_threshold = 1e-6
    elif where == "data":
        inputs = trainer.data.model_inputs
        trainer.data.model_inputs = lambda batch: (inputs(batch)[0].index_fill(0, torch.tensor(0), torch.nan), None)
    elif where == "gradient":
        parameter = next(trainer.model.parameters())
        parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(0), torch.inf))
    elif where == "activation":
        module = trainer.model.postprocess[0]
        module.register_forward_hook(lambda _module, _inputs, output: output * torch.nan)
    elif where == "loss":
        objective = trainer.objective.__class__.__call__
        trainer.objective = Wrapped(
            trainer.objective, lambda out, step: _spoiled(objective(trainer.objective.inner, out, step))
        )


def _spoiled(result):
    loss, statistics = result
    return loss * torch.inf, statistics


class Wrapped:
    def __init__(self, inner, call):
        self.inner, self.call = inner, call

    def __call__(self, out, step):
        return self.call(out, step)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_a_finite_step_moves_everything(make_trainer):
    trainer = make_trainer()
    assert take_step(trainer, 0)
    before = snapshot(trainer)
    assert take_step(trainer, 1)
    after = snapshot(trainer)
    assert {name.partition("/")[0] for name in before} == {"model", "ema", "optimizer", "regularizers"}
    assert [name for name, tensor in before.items() if torch.equal(tensor, after[name])] == []
    assert any("running_mean" in name for name in before)


@pytest.mark.parametrize("where", ["data", "activation", "loss", "gradient", "norm"])
@pytest.mark.parametrize("micro_batch", [8, 4])
def test_a_skipped_step_changes_no_bit(make_trainer, where, micro_batch):
    trainer = make_trainer(f"train.micro_batch={micro_batch}")
    assert take_step(trainer, 0)
    before = snapshot(trainer)
    poison(trainer, where)
    assert not take_step(trainer, 1)
    assert_same(before, snapshot(trainer))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_training_continues_after_a_non_finite_step(make_trainer):
    """Step 2 of 6 is skipped; the other five count, the figures of the interval are finite, and the data position
    advances.
    """
    trainer = make_trainer()
    spoil_steps(trainer, {2})
    seen = []
    assert trainer.fit(on_batches=lambda step, batches: seen.append((step, batches[0].positions.tolist())))
    scalars = trainer.interval_scalars()
    assert seen == [(step, list(range(8 * step, 8 * step + 8))) for step in range(6)]
    assert trainer.progress.skipped_steps == scalars["train/skipped_steps"] == 1
    assert trainer.progress.skipped_in_a_row == 0
    assert all(torch.isfinite(torch.tensor(value)) for value in scalars.values())


def spoil_steps(trainer: Trainer, steps: set[int]) -> None:
    inputs = trainer.data.model_inputs

    def spoiled(batch):
        x, condition = inputs(batch)
        return (x * torch.nan if int(batch.positions[0]) // 8 in steps else x), condition

    trainer.data.model_inputs = spoiled


def test_too_many_non_finite_steps_end_the_run_with_advice(make_trainer):
    trainer = make_trainer("train.max_skipped_steps=3", "train.steps=20")
    spoil_steps(trainer, {1, 4, 5, 6, 7})
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row .* optim.lr.* optim.clip"):
        trainer.fit()
    assert trainer.step == 7
    assert trainer.progress.skipped_steps == 4


def test_a_step_reads_the_device_once(make_trainer, monkeypatch):
    trainer = make_trainer()
    take_step(trainer, 0)
    batches = list(islice(iter(trainer.data.batches(1)), 1))
    on_the_host = {id(slots["step"]) for slots in trainer.state.optimizer.state.values()} | {id(batches[0].positions)}
    reads = []
    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy"):
        monkeypatch.setattr(Tensor, name, recording(getattr(Tensor, name), name, reads))
    trainer.train_step(1, batches)
    assert [name for name, read in reads if read not in on_the_host] == ["item"]


def recording(method, name, reads):
    def recorded(tensor, *arguments):
        reads.append((name, id(tensor)))
        return method(tensor, *arguments)

    return recorded


def test_micro_batches_add_up_to_the_batch(make_trainer, monkeypatch):
    """In float64, and without what couples images (batch norm in training, KL balancing), four quarters are the
    whole.
    """
    gradients = []
    for micro_batch in (8, 2):
        trainer = make_trainer(
            "objective.kl_balancing=none", f"train.micro_batch={micro_batch}", "train.ema_decay=0.0", precision="fp64"
        )
        trainer.model.eval()
        monkeypatch.setattr(trainer.state, "apply_update", lambda step: None)
        monkeypatch.setattr(trainer.state.optimizer, "zero_grad", lambda set_to_none: None)
        assert take_step(trainer, 1)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))
    assert gradients[0].norm() > 1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


def test_gradients_are_clipped_to_the_norm_asked_for(make_trainer, monkeypatch):
    trainer = make_trainer("optim.clip=0.5")
    norms = []
    monkeypatch.setattr(
        trainer.state,
        "apply_update",
        lambda step: norms.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()),
    )
    assert take_step(trainer, 0)
    assert norms[0].item() == pytest.approx(0.5, rel=1e-5)
    assert trainer.interval_scalars()["train/grad_norm"] > 1


def test_bf16_stays_close_to_float32(make_trainer):
    """50 steps: mean ELBO within 2 %; what the step gives back is float32."""
    elbo = {}
    for precision in ("fp32", "bf16"):
        trainer = make_trainer("train.steps=50", "optim.lr=2e-3", precision=precision)
        trainer.fit()
        elbo[precision] = trainer.interval_scalars()["train/elbo"]
        assert trainer.progress.skipped_steps == 0
        assert {tensor.dtype for tensor in trainer.model.state_dict().values()} == {torch.float32, torch.int64}
    assert elbo["bf16"] == pytest.approx(elbo["fp32"], rel=0.02)
    assert elbo["bf16"] != elbo["fp32"]


def test_speed_is_that_of_training_alone(make_trainer, monkeypatch):
    """Steps of 2 s with a validation, pictures and what came before training between them, on a clock of the test."""
    trainer = make_trainer("train.steps=12")
    now = [100.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(trainer, "throughput", Throughput(lambda: now[0]))
    monkeypatch.setattr(trainer, "train_step", lambda step, batches: spend(2.0))
    spend(500.0)
    records = []
    cadences = [
        Cadence(4, lambda step: spend(1000.0)),
        Cadence(2, lambda step: records.append(trainer.throughput.report())),
        Cadence(6, lambda step: spend(50.0)),
    ]
    trainer.fit(cadences)
    assert records == [{"perf/images_per_second": 4.0, "perf/step_ms": 2000.0, "perf/data_wait": 0.0}] * 6


def test_cadences_are_due_every_so_often_and_at_the_end():
    done = Cadence(4, lambda step: None)
    assert [step for step in range(1, 11) if done.due(step, last=10)] == [4, 8, 10]
    assert not any(Cadence(0, lambda step: None).due(step, last=10) for step in range(1, 11))
