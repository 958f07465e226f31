"""`train.micro_batch=auto`, and what a run that is out of memory says."""

import logging
import re

import pytest
import torch
import yaml

from benchmarks.fake_step import fake_processes
from benchmarks.step_counter import StepCounter
from pipeline.distributed import collectives
from pipeline.distributed.preemption import StopRequest
from pipeline.run import micro_batch
from pipeline.run.attempt import FAILURES, run_attempt
from pipeline.run.micro_batch import (
    fits,
    largest_that_fits,
    resolve_micro_batch,
    take_trial_step,
    with_micro_batch,
)
from pipeline.run.out_of_memory import OutOfMemory
from pipeline.run.step_memory import estimate, meta_model
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.status import read_status
from pipeline.training.trainer import Trainer

CUDA_ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which\nmore"


@pytest.fixture
def attempt(make_recipe, make_runtime, tmp_path):
    """(overrides) -> how a run in tmp_path/run ended."""

    def run(*overrides: str) -> str:
        recipe = make_recipe("tracking.log_every=1", "samples.every=0", "validation.every=0", *overrides)
        with StopRequest() as stop:
            return run_attempt(tmp_path / "run", recipe, make_runtime(), stop)

    log = logging.getLogger("pipeline")
    log.setLevel(logging.INFO)
    return run


def test_the_number_that_is_found_is_the_runs_from_then_on(attempt, tmp_path, monkeypatch):
    seen, train_step = [], Trainer.train_step

    def recorded(trainer: Trainer, step: int, batches: list):
        seen.append([len(batch.images) for batch in batches])
        return train_step(trainer, step, batches)

    monkeypatch.setattr(Trainer, "train_step", recorded)
    monkeypatch.setattr(micro_batch, "fits", lambda recipe, runtime, images: images <= 3)
    assert attempt("train.micro_batch=auto", "train.steps=2") == "finished"
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["micro_batch"] == 2
    latest = Checkpoints(tmp_path / "run/checkpoints").latest()
    assert latest.facts["settings"]["train"]["micro_batch"] == 2
    monkeypatch.setattr(micro_batch, "fits", lambda recipe, runtime, images: pytest.fail("tried again"))
    assert attempt("train.micro_batch=auto", "train.steps=3") == "finished"
    assert seen == [[2, 2, 2, 2]] * 3  # batches of 8


def test_no_size_fits(attempt, tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batch, "fits", lambda recipe, runtime, images: False)
    with pytest.raises(ValueError, match=r"train.micro_batch=auto: no micro-batch of .* fits on CPU \(not even 1 im"):
        attempt("train.micro_batch=auto")
    assert not (tmp_path / "run/config.yaml").exists()


def test_the_smallest_of_the_ranks_numbers_is_used(make_recipe, make_runtime, monkeypatch, tmp_path):
    runtime = make_runtime()
    gather = runtime.gather_objects
    monkeypatch.setattr(
        runtime, "gather_objects", lambda value: [value, 2] if isinstance(value, int) else gather(value)
    )
    monkeypatch.setattr(micro_batch, "fits", lambda recipe, runtime, images: True)
    recipe = make_recipe("train.micro_batch=auto")
    assert resolve_micro_batch(recipe, runtime, tmp_path / "run").train.micro_batch == 2


def test_on_a_gpu_sizes_are_tried_from_the_largest_down(make_recipe, make_runtime, monkeypatch):
    tried, runtime = [], make_runtime()
    runtime.device, runtime.world_size = torch.device("cuda"), 2
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *arguments: None)

    def trial(recipe, runtime, images):
        tried.append(images)
        if images > 3:
            raise torch.OutOfMemoryError(CUDA_ERROR)

    monkeypatch.setattr(micro_batch, "take_trial_step", trial)
    assert largest_that_fits(make_recipe("train.batch_size=12"), runtime) == 6
    assert tried == [6, 3]


def test_on_cpus_the_estimate_is_compared_with_the_available_memory(make_recipe, make_runtime, monkeypatch):
    recipe, runtime = make_recipe(), make_runtime()
    needed = estimate(with_micro_batch(recipe, 4)).peak(4)  # of a batch of 8: gradients accumulate
    monkeypatch.setattr(micro_batch, "available_bytes", lambda: 1.01 * needed / micro_batch.USABLE)
    assert [fits(recipe, runtime, images) for images in (8, 4)] == [False, True]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_step_reaches_no_other_process_and_changes_nothing(make_recipe, make_runtime, monkeypatch, precision):
    """As a rank of eight that do not answer."""
    recipe, runtime = make_recipe(f"train.precision={precision}"), make_runtime(precision)
    runtime.world_size = 8
    for name in ("all_reduce", "all_gather", "all_gather_single", "all_gather_into_tensor"):
        monkeypatch.setattr(collectives.dist, name, lambda *arguments: pytest.fail("a collective"), raising=False)
    steps = []
    with fake_processes(8):
        assert collectives.num_processes() == 8
        monkeypatch.setattr(collectives, "_all_gather_single", lambda *arguments: pytest.fail("a collective"))
        update = micro_batch.TrainingState.apply_update
        monkeypatch.setattr(
            micro_batch.TrainingState, "apply_update", lambda state, step: steps.append(update(state, step))
        )
        take_trial_step(recipe, runtime, 3)
        assert collectives.num_processes() == 8
    assert len(steps) == 1


def test_a_trial_step_has_room_for_gradients_that_accumulate(make_recipe, make_runtime):
    def peak(batch_size: int) -> int:
        recipe = make_recipe(f"train.batch_size={batch_size}")
        with StepCounter() as counter:
            take_trial_step(recipe, make_runtime(), 4)
        return counter.memory.peak

    gradients = 4 * sum(parameter.numel() for parameter in meta_model(make_recipe()).parameters())
    assert peak(8) - peak(4) == pytest.approx(gradients, rel=0.01)


def test_a_trial_step_keeps_what_the_runs_steps_will_keep(make_recipe, make_runtime):
    """With recomputation it saves fewer bytes for backward."""

    def saved(what: str) -> int:
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            take_trial_step(make_recipe(f"train.recompute={what}"), make_runtime(), 8)
        return sum(sizes.values())

    assert saved("cells") < 0.7 * saved("none")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_ERROR), None])
def test_a_step_out_of_memory_names_the_settings_that_help(attempt, tmp_path, monkeypatch, error):
    error = error or RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    def fail(trainer: Trainer, step: int, batches: list):
        raise error

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(OutOfMemory) as caught:
        attempt()
    message = str(caught.value)
    assert "\n" not in message
    assert "out of memory on CPU with 8 images per process" in message
    assert "tried to allocate" in message.lower()
    for setting in ("as it is", "train.micro_batch=4", "train.micro_batch=2", "train.recompute=norms"):
        assert re.search(rf"{setting}: [\d.]+ MiB", message)
    assert read_status(tmp_path / "run").state == "failed"
    assert next(code for kind, code in FAILURES.items() if isinstance(caught.value, kind)) == 2


def test_other_errors_of_a_step_pass(attempt, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", lambda *arguments: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        attempt()
