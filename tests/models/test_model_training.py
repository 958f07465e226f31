"""Training of every model: it learns, two processes equal one, and a resumed run equals an uninterrupted one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from pipeline.distributed.runtime import Runtime
from pipeline.run.resume import restore
from pipeline.run.session import Session
from pipeline.tracking.tracker import Tracker
from pipeline.training.trainer import Trainer
from tests.helpers.model_cases import (
    ONE_PER_MODEL,
    TWO_PROCESS_CASES,
    make_recipe,
    make_trainer,
    train_losses,
    write_data,
)

ROOT = Path(__file__).parents[2]
WITH_CELLS = ("nvae", "vdvae", "efficient_vdvae")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def runtime():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Runtime("fp32", cpu_threads=1)
    AcceleratorState._reset_state(reset_partial_state=True)


def train_on(trainer: Trainer, batch, steps: int) -> dict[str, float]:
    """Trains on one batch, with new noise at every step. Returns the averages over the last step."""
    for step in range(trainer.progress.step, trainer.progress.step + steps):
        assert trainer.train_step(step, [batch._replace(positions=batch.positions + 8 * step)]) is None
        scalars = trainer.interval_scalars()
        trainer.progress.step += 1
    return scalars


@pytest.mark.parametrize("case", ONE_PER_MODEL.values())
def test_reconstructions_improve_at_a_small_beta_and_the_kl_falls_at_a_large_one(case, data, runtime):
    """On eight images. A reconstruction that ignores its image has at least the error of the average image."""
    overrides = ["train.batch_size=8", "data.flip=false", "objective.kl_warmup_portion=0", "optim.schedule=constant"]
    first = make_trainer(make_recipe(case, data, *overrides, "objective.beta=0.01"), runtime)
    batch = next(iter(first.data.batches(0)))
    before = train_on(first, batch, 60)
    x, condition = first.data.model_inputs(batch)
    model = first.model.eval()
    with torch.no_grad():
        noise = [torch.zeros(8, *group.shape) for group in model.groups]
        error = (model.reconstruct(x, noise, condition) - x).square().mean()
    average_image = (x.mean(0) - x).square().mean()
    second = make_trainer(make_recipe(case, data, *overrides, "objective.beta=20"), runtime)
    second.model.load_state_dict(first.model.state_dict())
    after = train_on(second, batch, 15)
    assert error < 0.9 * average_image
    assert before["train/kl"] > 1
    assert after["train/kl"] < 0.5 * before["train/kl"]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(data, tmp_path):
    """All models in one launch: float64, three steps with regularizers, clipping and moving average, to 1e-10. Some of
    them also compiled as a whole.
    """
    worker, out = str(ROOT / "tests" / "models" / "models_worker.py"), tmp_path / "losses.json"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/cpu_2proc.yaml")]
    command = [sys.executable, *launcher, "--main_process_port", "0", worker, str(data), str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads(out.read_text())
    assert two["world_size"] == 2
    assert two["graphs"] >= 2 * len(two["compiled"])  # of each a model and an objective
    AcceleratorState._reset_state(reset_partial_state=True)
    runtime = Runtime("fp64", cpu_threads=1)
    for case, losses in two["losses"].items():
        one = train_losses(make_recipe(case, data, "train.precision=fp64"), runtime, steps=3)
        assert one == pytest.approx(losses, rel=1e-10), case
        assert one == pytest.approx(two["compiled"].get(case, losses), rel=1e-10), case
    assert set(two["losses"]) == set(TWO_PROCESS_CASES)


@pytest.mark.parametrize("case", ONE_PER_MODEL.values())
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(case, data, runtime, tmp_path):
    """A model with cells recomputes activations from there on, which changes nothing else."""
    overrides = ["train.steps=4", "samples.count=10", "validation.every=4"]

    def train(folder: str, *more: str, stop: int | None = None) -> dict[str, bytes]:
        recipe = make_recipe(case, data, *overrides, *more)
        session = Session(recipe, runtime, tmp_path / folder)
        checkpoint = session.checkpoints.latest()
        if checkpoint is not None:
            restore(session, checkpoint)
        session.trainer.total_steps = stop or session.trainer.total_steps
        with Tracker(recipe.tracking, tmp_path / folder, {}, is_main=True, start_step=session.trainer.step) as tracker:
            session.run(tracker)
        last = sorted((tmp_path / folder / "checkpoints").iterdir())[-1]
        return {file.name: file.read_bytes() for file in last.glob("*.safetensors")}

    uninterrupted = train("uninterrupted")
    train("resumed", stop=2)
    more = (
        ["train.recompute=cells"] if make_recipe(case, data).model.name in ("nvae", "vdvae", "efficient_vdvae") else []
    )
    assert train("resumed", *more) == uninterrupted
