"""torch.compile: whole models, objectives and single cells as one graph each, with eager's numbers, compiled once."""

import copy
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from pipeline.models.base import VAE
from pipeline.run.compilation import compile_training, prepare_compiler
from pipeline.training.objective import Objective, ObjectiveConfig
from pipeline.training.train_config import TrainConfig
from tests.helpers.compiling import needs_compiler, no_compiler_needed
from tests.helpers.launching import ROOT
from tests.helpers.model_cases import (
    CASES,
    ONE_PER_MODEL,
    build_case,
    make_recipe,
    noise_for,
    train_losses,
    write_data,
)

WHOLE = TrainConfig(steps=1, compile="whole")
STEPS = 100
OTHER_CASES = [case for case in CASES if case not in ONE_PER_MODEL.values()]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_case(case: str) -> tuple[VAE, Tensor, list[Tensor], Tensor | None]:
    is_hierarchical = case.startswith("nvae") and "one group" not in case
    return build_case(case, *(["model.groups_per_scale=[2]"] if is_hierarchical else []))  # traced faster


def loss_of(model: VAE, objective: Objective, step: int, x: Tensor, condition: Tensor | None) -> Tensor:
    loss, _ = objective(model(x, noise_for(model, len(x), x.dtype, seed=step), condition), step)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_CASES)
def test_models_and_objective_are_one_graph_each(case):
    model, x, _, condition = small_case(case)
    objective = Objective(ObjectiveConfig(free_bits=0.5), model.groups, STEPS)
    expected = loss_of(copy.deepcopy(model), objective, 3, x, condition)
    compile_training(WHOLE, model, objective, backend="eager")  # raises at a graph break
    torch.testing.assert_close(loss_of(model, objective, 3, x, condition), expected)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_PER_MODEL.values())
def test_whole_models_are_compiled_once_and_train_as_eager_ones(case):
    model, x, _, condition = small_case(case)
    eager = copy.deepcopy(model)
    objectives = [Objective(ObjectiveConfig(), model.groups, STEPS) for _ in range(2)]
    compile_training(WHOLE, model, objectives[0], backend="aot_eager")
    losses = []
    for recompilation_is_an_error in (False, True, True):
        with dynamo_config.patch(error_on_recompile=recompilation_is_an_error):
            step = len(losses)  # beta differs from step to step
            losses.append(loss_of(model.train(), objectives[0], step, x, condition))
            losses[-1].backward()
        expected = loss_of(eager.train(), objectives[1], step, x, condition)
        expected.backward()
        torch.testing.assert_close(losses[-1], expected, rtol=1e-10, atol=0)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert_equal_gradients(model, eager, 1e-8)


def test_training_and_evaluation_alternate_without_a_recompilation():
    model, x, _, condition = small_case("conv_vae by attributes")
    objective = Objective(ObjectiveConfig(), model.groups, STEPS)
    compile_training(WHOLE, model, objective, backend="eager")
    for recompilation_is_an_error in (False, True):
        with dynamo_config.patch(error_on_recompile=recompilation_is_an_error):
            loss_of(model.train(), objective, 0, x, condition)
    with torch.no_grad():
        loss_of(model.eval(), objective, 0, x, condition)  # graphs of its own
    assert counters["stats"]["unique_graphs"] == 4
    with dynamo_config.patch(error_on_recompile=True):
        loss_of(model.train(), objective, 1, x, condition)
        with torch.no_grad():
            loss_of(model.eval(), objective, 2, x, condition)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, make_runtime, precision):
    """Behind autocast and with micro-batches; nothing is compiled after the first step."""
    data = write_data(tmp_path)
    options = f"train.precision={precision}", "train.micro_batch=4"
    eager = train_losses(make_recipe("conv_vae by attributes", data, *options), make_runtime(precision), steps=3)
    recipe = make_recipe("conv_vae by attributes", data, *options, "train.compile=whole")
    with no_compiler_needed("eager") as stats:
        compiled = train_losses(recipe, make_runtime(precision), steps=3)
    assert stats["unique_graphs"] == 2
    assert compiled == pytest.approx(eager, rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.slow
def test_processes_wait_for_a_slow_compiler_for_longer_than_in_a_collective(tmp_path):
    """Rank 1 takes 6 seconds for each graph, with a timeout of 4. The passes that compile leave no trace."""
    worker, out = str(ROOT / "tests/training/compile_worker.py"), tmp_path / "states.pt"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/cpu_2proc.yaml")]
    command = [sys.executable, *launcher, "--main_process_port", "0", worker, str(write_data(tmp_path)), str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    states = torch.load(out, weights_only=True)
    for name, tensor in states["off"].items():
        torch.testing.assert_close(states["whole"][name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def assert_equal_gradients(ours: VAE, theirs: VAE, tolerance: float) -> None:
    """Relative to each gradient's norm. A bias in front of batch norm has the gradient 0 plus rounding: a share
    `tolerance` of the largest gradient's norm is allowed in addition.
    """
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(gradient.norm() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        distance = (parameter.grad - expected[name]).norm()
        assert distance <= tolerance * (expected[name].norm() + 1e-3 * largest), name


# ---- machine code


@pytest.mark.slow
@needs_compiler
def test_the_smallest_model_compiled_to_machine_code_trains_as_the_eager_one():
    model, x, _, condition = small_case("mlp_vae")
    eager = copy.deepcopy(model)
    objectives = [Objective(ObjectiveConfig(), model.groups, STEPS) for _ in range(2)]
    prepare_compiler(WHOLE, x.device)
    compile_training(WHOLE, model, objectives[0])
    for step in range(2):
        loss, expected = (loss_of(*pair, step, x, condition) for pair in zip((model, eager), objectives, strict=True))
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert counters["stats"]["unique_graphs"] == 3  # one of them is the trial of the compiler
    assert_equal_gradients(model, eager, 1e-8)


# ---- cells


def test_cells_are_one_graph_per_shape_and_train_as_eager_ones():
    model, x, _, condition = build_case("nvae", "model.groups_per_scale=[2]")
    eager = copy.deepcopy(model)
    objective = Objective(ObjectiveConfig(), model.groups, STEPS)
    cells = list(model.compilable_cells())
    assert {type(cell).__name__ for cell in cells} == {"ResidualCell"}
    compile_training(TrainConfig(steps=1, compile="cells"), model, objective, backend="aot_eager")
    for recompilation_is_an_error in (False, True):
        with dynamo_config.patch(error_on_recompile=recompilation_is_an_error):
            loss_of(model, objective, 0, x, condition).backward()
        loss_of(eager, objective, 0, x, condition).backward()
    assert 0 < counters["stats"]["unique_graphs"] <= len(cells)
    assert not counters["graph_break"]
    assert_equal_gradients(model, eager, 1e-8)
