"""What is true of every model and option: one test for each claim, run through model_cases.py."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from pipeline import models
from pipeline.distributed.runtime import Runtime
from pipeline.models.base import VAE, VAEOutput
from pipeline.recipe import build_model
from pipeline.run.resume import restore
from pipeline.run.session import Session
from pipeline.tracking.tracker import Tracker
from tests.helpers.model_cases import CASES, make_recipe, make_trainer, train_losses, write_data, zeros_and_noise

ROOT = Path(__file__).parents[2]
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("models"))


def condition_for(model: VAE, count: int, dtype=torch.float32) -> torch.Tensor | None:
    if not model.condition_size:
        return None
    return torch.eye(model.condition_size, dtype=dtype)[torch.arange(count) % model.condition_size]


def fresh(case: str, data: Path) -> tuple[VAE, torch.Tensor, torch.Tensor | None]:
    """A float64 model, five images and their conditions."""
    torch.manual_seed(1)
    model = build_model(make_recipe(case, data)).double()
    x = torch.rand(5, *model.image_shape, dtype=torch.float64)
    return model, x, condition_for(model, 5, torch.float64)


@each_case
def test_shapes_and_gradients(case, data):
    model, x, condition = fresh(case, data)
    out = model(x, zeros_and_noise(model, 5, x.dtype), condition)
    groups = len(model.groups)
    assert isinstance(out, VAEOutput)
    assert out.log_px.shape == out.log_qz.shape == out.log_pz.shape == (5,)
    assert out.kl.shape == (5, groups)
    assert [units.shape for units in out.kl_units] == [group.shape[:1] for group in model.groups]
    assert all(penalty.shape == (5,) for penalty in out.penalties.values())
    (-out.elbo + sum(out.penalties.values())).mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DDP waits for each
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@each_case
def test_drawing_encoding_and_decoding(case, data):
    model, x, condition = fresh(case, data)
    model.eval()
    noise = zeros_and_noise(model, 5, x.dtype)[: len(model.groups)]
    with torch.no_grad():
        latents = model.encode(x, noise, condition)
        drawn = model.sample(noise, 0.7, condition)
        reconstructed = model.reconstruct(x, noise, condition)
        decoded = model.decode(latents, condition)
    assert [z.shape for z in latents] == [(5, *group.shape) for group in model.groups]
    for images in (drawn, reconstructed, decoded):
        assert images.shape == x.shape
        assert 0 <= images.min() <= images.max() <= 1
    torch.testing.assert_close(reconstructed, decoded)


@each_case
def test_a_condition_that_does_not_fit_is_refused(case, data):
    model, x, condition = fresh(case, data)
    noise = zeros_and_noise(model, 5, x.dtype)
    wrong = None if model.condition_size else torch.ones(5, 2, dtype=x.dtype)
    for call in (
        lambda: model(x, noise, wrong),
        lambda: model.sample(noise, 1.0, wrong),
        lambda: model.encode(x, noise, wrong),
        lambda: model.decode(noise[: len(model.groups)], wrong),
    ):
        with pytest.raises(ValueError, match="takes a condition of"):
            call()


@each_case
def test_the_condition_matters_once_trained(case, data, runtime):
    if not CASES[case][1]:
        pytest.skip("not conditional")
    trainer = make_trainer(make_recipe(case, data), runtime)
    stream = iter(trainer.data.batches(0))
    for step in range(3):
        trainer.train_step(step, [next(stream)])
    model = trainer.model.eval()
    noise = [part[:1].expand(2, -1, -1, -1) for part in zeros_and_noise(model, 1)][: len(model.groups)]
    with torch.no_grad():
        one, other = model.sample(noise, 1.0, torch.eye(model.condition_size)[:2])
    assert (one - other).abs().max() > 1e-6


@each_case
def test_densities_agree_with_the_bound_and_the_importance_weighted_bound_is_above_it(case, data):
    """log p(x, z) - log q(z | x) averages to the ELBO: 4 standard errors of 400 draws. Its log-mean-exp is above."""
    model, x, condition = fresh(case, data)
    model.eval()
    draws, few = 400, 2
    x = x[:few].repeat_interleave(draws, 0)
    condition = None if condition is None else condition[:few].repeat_interleave(draws, 0)
    with torch.no_grad():
        out = model(x, zeros_and_noise(model, few * draws, x.dtype), condition)
    weights = (out.log_px + out.log_pz - out.log_qz).view(few, draws)
    difference = (weights - out.elbo.view(few, draws)).mean(1)
    error = (weights - out.elbo.view(few, draws)).std(1) / draws**0.5
    assert (difference.abs() <= 4 * error + 1e-9).all(), (difference, error)
    assert (weights.logsumexp(1) - torch.tensor(draws).log() > out.elbo.view(few, draws).mean(1) - 1e-9).all()


@pytest.fixture(scope="module")
def runtime():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Runtime("fp32", cpu_threads=1)
    AcceleratorState._reset_state(reset_partial_state=True)


@each_case
def test_eight_images_are_learnt_by_heart(case, data, runtime):
    """Decoded posterior means come nearer to the images than their average picture by far."""
    steps = 150
    words = [
        "train.batch_size=8",
        "data.flip=false",
        "objective.kl_warmup_portion=0",
        "objective.beta=0.1",
        "optim.schedule=constant",
    ]
    trainer = make_trainer(make_recipe(case, data, *words), runtime)
    batch = next(iter(trainer.data.batches(0)))
    elbos = []
    for step in range(steps):
        fresh_noise = batch.positions + 8 * step
        assert trainer.train_step(step, [batch._replace(positions=fresh_noise)])
        elbos.append(trainer.interval_scalars()["train/elbo"])
        trainer.progress.step += 1
    x, condition = trainer.data.model_inputs(batch)
    model = trainer.model.eval()
    with torch.no_grad():
        noise = [torch.zeros(8, *group.shape) for group in model.groups]
        error = (model.reconstruct(x, noise, condition) - x).square().mean()
    average = (x.mean(0) - x).square().mean()
    assert sum(elbos[-10:]) > sum(elbos[:10])
    assert error < 0.6 * average, (float(error), float(average))


def test_two_processes_give_the_losses_of_one(data, tmp_path):
    """All models in one launch: float64, three steps with penalties, clipping and moving average, 1e-10 relative."""
    worker, out = str(ROOT / "tests" / "models" / "models_worker.py"), tmp_path / "losses.json"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/cpu_2proc.yaml")]
    command = [sys.executable, *launcher, "--main_process_port", "0", worker, str(data), str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads(out.read_text())
    assert two["world_size"] == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    runtime = Runtime("fp64", cpu_threads=1)
    for case, losses in two["losses"].items():
        one = train_losses(make_recipe(case, data, "train.precision=fp64"), runtime, steps=3)
        assert one == pytest.approx(losses, rel=1e-10), case
    assert set(two["losses"]) == set(CASES)


@each_case
def test_resumed_equals_straight_bit_for_bit(case, data, runtime, tmp_path):
    words = ["train.steps=4", "samples.count=10", "validation.every=4"]

    def train(folder: str, stop: int | None = None) -> dict[str, bytes]:
        recipe = make_recipe(case, data, *words)
        session = Session(recipe, runtime, tmp_path / folder)
        checkpoint = session.checkpoints.latest()
        if checkpoint is not None:
            restore(session, checkpoint)
        session.trainer.total_steps = stop or session.trainer.total_steps
        with Tracker(recipe.tracking, tmp_path / folder, {}, is_main=True, start_step=session.trainer.step) as tracker:
            session.run(tracker)
        last = sorted((tmp_path / folder / "checkpoints").iterdir())[-1]
        return {file.name: file.read_bytes() for file in last.glob("*.safetensors")}

    straight = train("straight")
    train("parts", stop=2)
    assert train("parts") == straight


@pytest.mark.parametrize("path", sorted(Path(models.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_models_open_no_files(path):
    """What a model needs from a file is loaded by its caller and given to it when it is built."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Name):
            assert node.id != "open"
    assert {name for name in imported if name.split(".")[0] in ("os", "io", "shutil", "pathlib")} == set()
    assert {name for name in imported if name.startswith("pipeline.storage")} == set()


@pytest.mark.parametrize("temperature", [-0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("case", ["nvae", "mlp_vae"])
def test_a_temperature_below_zero_or_not_finite_is_refused(case, temperature, data):
    model, _, condition = fresh(case, data)
    with pytest.raises(ValueError, match=f"temperature {temperature}"):
        model.sample(zeros_and_noise(model, 5, torch.float64), temperature, condition)
