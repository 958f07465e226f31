"""Whether training on this machine's GPU computes what it computes on a CPU, in five minutes at most.

    make gpu-check
    python -m benchmarks.gpu_check [--parts float64 resume ...] [--out FOLDER]

  float64        loss and gradients of the GPU against those of the CPU, with noise sampled on the CPU: 1e-9
  float32        the same in float32 without TensorFloat-32, against float64 on the CPU: 1e-4
  bf16           mean evidence lower bound of 50 training steps in bf16 against float32: 1 %
  resume         ten steps against five, a new process's state from the checkpoint's tensors, and five more: to the bit,
                 with train.deterministic
  two-processes  losses of two processes that share the GPU against one, in float64: 1e-9
  compiled       losses of three steps with each train.compile, and with recomputed cells, against eager: 1e-4
  skip           a step with a NaN changes nothing, and the next one trains
  memory         a run that does not fit says what to set
  golden         the numbers of the reference release (tests/models/test_nvae_golden.py) with the model on the GPU;
                 needs NVAE_GOLDEN_DIR
  recipes        the first 100 steps of the recipes of the paper: no NaN

The parts share the five minutes in proportion to their limits; what the first ones do not use, the later ones get.
Results are in benchmarks/results/gpu_check.json and gpu_check.md. Exit code 1: a check failed or could not be made.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data import noise_set
from benchmarks.parts import ROOT, Part, Report, Results, parse, run_all
from benchmarks.ranks import train_on_ranks
from benchmarks.steps import (
    EPOCH_SIZES,
    SMALL,
    free_memory,
    new_runtime,
    new_trainer,
    one_gpu_recipe,
    sample_noise,
    small_recipe,
    synthetic_images,
    train,
    without_compiling,
)
from pipeline.data.preprocess import to_model_input
from pipeline.recipe import Recipe, build_model
from pipeline.training.objective import Objective
from pipeline.training.regularizers import Regularizers
from pipeline.training.trainer import Trainer

SECONDS = 300
BATCH = 8
WIDE = ("model.encoder_channels=32", "model.decoder_channels=32", "data.size=32")
"""Overrides of the small model where there is a GPU."""


def check(report: Report, name: str, value: float, bound: float) -> None:
    """Passes where `value` is at most `bound`, which a NaN is not."""
    report(check=name, value=float(value), bound=bound, passed=bool(value <= bound), note="")


def checked_recipe(tiny: bool, *overrides: str) -> Recipe:
    return small_recipe(*(() if tiny else WIDE), *overrides)


# ------------------------------------------------------------------------------------------------- against the CPU


def loss_and_gradients(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """{"loss": ..., parameter: gradient} on the CPU, in float64, in the middle of the KL warm-up. `dtype`: of model and
    images; the noise is sampled on the CPU.
    """
    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe).to(dtype)
    model.to(device, memory_format=torch.channels_last).train()
    images = synthetic_images(BATCH, recipe.data.channels, recipe.data.size).to(device)
    x = to_model_input(images, recipe.data.bits, dtype).contiguous(memory_format=torch.channels_last)
    noise = sample_noise(model, BATCH, device, dtype)
    objective = Objective(recipe.objective, model.groups, total_steps=100)
    loss, _ = objective(model(x, noise, None), 15)
    penalty, _ = Regularizers(recipe.regularizers, model, seed=0)(objective.warmup(15))
    (loss + penalty).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach().cpu().double() for name, value in ({"loss": loss + penalty} | gradients).items()}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of |a - b| / (|b| + L), where L is the largest norm of a gradient: a true gradient of zero has rounding noise."""
    largest = max(value.norm() for name, value in expected.items() if name != "loss")
    errors = [
        ((found[name] - value).abs() / (value.abs() + (0 if name == "loss" else largest))).max()
        for name, value in expected.items()
    ]
    return max(error.item() for error in torch.stack(errors).nan_to_num(nan=torch.inf))


def device_of(recipe: Recipe) -> torch.device:
    """Sets torch up as the recipe says."""
    return new_runtime(recipe).device


def float64(report: Report, tiny: bool) -> None:
    check_against_cpu(report, checked_recipe(tiny, "train.precision=fp64"), torch.float64, 1e-9)


def float32(report: Report, tiny: bool) -> None:
    check_against_cpu(report, checked_recipe(tiny, "train.tf32=false"), torch.float32, 1e-4)


def check_against_cpu(report: Report, recipe: Recipe, dtype: torch.dtype, limit: float) -> None:
    """Loss and gradients of the device in this dtype against float64 on the CPU."""
    device = device_of(recipe)
    expected = loss_and_gradients(recipe, torch.device("cpu"), torch.float64)
    found = loss_and_gradients(recipe, device, dtype)
    check(report, f"loss and {len(found) - 1} gradients, relative", largest_error(found, expected), limit)


# ----------------------------------------------------------------------------------------------------- training steps


def bf16(report: Report, tiny: bool) -> None:
    elbo = {}
    for precision in ("fp32", "bf16"):
        trainer = new_trainer(checked_recipe(tiny, "train.tf32=false", f"train.precision={precision}"))
        train(trainer, 5 if tiny else 50)
        elbo[precision] = trainer.interval_scalars()["train/elbo"]
    error = abs(elbo["bf16"] - elbo["fp32"]) / abs(elbo["fp32"])
    check(report, f"ELBO {elbo['fp32']:.1f} nats in float32, relative difference", error, 0.01)


def on_cpu(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Copies of all that a checkpoint holds."""
    return {
        stem: {name: tensor.detach().cpu().clone() for name, tensor in part.items()}
        for stem, part in trainer.state.tensors().items()
    }


def num_different(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> int:
    """Tensors that differ in any bit, or are in one of the two only."""
    first, second = (
        {(stem, name): tensor for stem, part in state.items() for name, tensor in part.items()} for state in (a, b)
    )
    common = first.keys() & second.keys()
    return len(first.keys() ^ second.keys()) + sum(not torch.equal(first[key], second[key]) for key in common)


def resume(report: Report, tiny: bool) -> None:
    for precision in ("fp32", "bf16"):
        recipe = checked_recipe(tiny, "train.deterministic=true", f"train.precision={precision}")
        uninterrupted, first, second = (new_trainer(recipe) for _ in range(3))
        train(uninterrupted, 10)
        train(first, 5)
        second.resume(replace(first.progress), on_cpu(first))
        train(second, 5)
        different = num_different(on_cpu(uninterrupted), on_cpu(second))
        check(report, f"tensors that differ after a resume, {precision}", different, 0)


def two_processes(report: Report, tiny: bool) -> None:
    overrides = [*SMALL, *(() if tiny else WIDE), "train.batch_size=8", "train.precision=fp64"]
    one = new_trainer(checked_recipe(tiny, "train.precision=fp64"))
    expected: list[float] = []
    train(one, 3, after=lambda: expected.append(one.interval_scalars()["train/loss"]))
    found = train_on_ranks(2, 3, "nvae_cifar10", *overrides)
    assert found["processes"] == 2
    check(report, f"losses on two processes ({found['device']}), relative", relative(found["losses"], expected), 1e-9)


def relative(found: Iterable[float], expected: Iterable[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def losses(recipe: Recipe) -> list[float]:
    trainer, found = new_trainer(recipe), []
    train(trainer, 3, after=lambda: found.append(trainer.interval_scalars()["train/loss"]))
    return found


def compiled(report: Report, tiny: bool) -> None:
    exact = ("train.tf32=false",)
    expected = losses(checked_recipe(tiny, *exact))
    for mode, recompute in (("cells", "none"), ("whole", "none"), ("whole", "cells")):
        settings = f"train.compile={mode}", f"train.recompute={recompute}"
        with without_compiling(tiny):
            found = losses(checked_recipe(tiny, *exact, *settings))
        check(report, f"losses with {' '.join(settings)}, relative", relative(found, expected), 1e-4)
        free_memory()


def skip(report: Report, tiny: bool) -> None:
    trainer = new_trainer(checked_recipe(tiny))
    train(trainer, 1)
    before, inputs = on_cpu(trainer), trainer.data.model_inputs
    trainer.data.model_inputs = lambda batch: (inputs(batch)[0] * torch.nan, None)
    skipped = train(trainer, 1)
    check(report, "steps with a NaN that were not skipped", 1 - skipped, 0)
    check(report, "tensors that such a step changed", num_different(before, on_cpu(trainer)), 0)
    trainer.data.model_inputs = inputs
    check(report, "steps after it that were skipped", train(trainer, 2), 0)


# --------------------------------------------------------------------------------------------------------- whole runs

LITTLE_MEMORY = "torch.cuda.set_per_process_memory_fraction(0.01)"
NO_MEMORY = """
from pipeline.models.nvae import NVAE
forward = NVAE.forward
def allocate(model, x, *rest):
    if x.is_meta:  # where the message's estimate is made
        return forward(model, x, *rest)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
NVAE.forward = allocate
"""
RUN = "import sys, torch\n{}\nfrom pipeline.train import main\nsys.exit(main(sys.argv[1:]))"


def memory(report: Report, tiny: bool) -> None:
    """Of the command, whose memory is limited. On a CPU, the model raises the error of a full GPU."""
    with tempfile.TemporaryDirectory() as folder:
        root = noise_set(Path(folder), 16, 3, 64)
        overrides = [*SMALL, f"data.root={root}", "validation.split=train", "tracking.wandb=disabled", "data.workers=0"]
        overrides += ["train.steps=1"]
        overrides += ["train.batch_size=8"] if tiny else ["data.size=16", "train.batch_size=4096"]
        limit = LITTLE_MEMORY if torch.cuda.is_available() else NO_MEMORY
        command = [sys.executable, "-c", RUN.format(limit), "--model", "nvae_cifar10", "--run-dir", f"{folder}/run"]
        done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=100)
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    missing = [name for name in ("train.micro_batch", "train.recompute") if not any(name in line for line in lines)]
    check(report, f"settings that the message does not name: {', '.join(missing) or 'none'}", len(missing), 0)
    check(report, "lines of a traceback", done.stderr.count("Traceback"), 0)


def golden(report: Report, tiny: bool) -> None:
    if "NVAE_GOLDEN_DIR" not in os.environ:
        report(check="golden tests", value=None, bound=None, passed=None, note="NVAE_GOLDEN_DIR is not set")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = ["-k", "test_input"] if tiny else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/models/test_nvae_golden.py"]
    environment = os.environ | {"NVAE_TEST_DEVICE": device}
    done = subprocess.run([*command, *chosen], cwd=ROOT, env=environment, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1:]
    note = f"on {device}: {''.join(summary)}"
    report(check="golden tests", value=done.returncode, bound=0, passed=done.returncode == 0, note=note)


def recipes(report: Report, tiny: bool) -> None:
    steps = 2 if tiny else 100
    for name in ("nvae_cifar10", "nvae_celeba64", "nvae_mnist"):
        trainer = new_trainer(one_gpu_recipe(name, tiny), epoch_size=EPOCH_SIZES[name])
        check(report, f"steps of the first {steps} of {name} that were not finite", train(trainer, steps), 0)
        del trainer
        free_memory()


PARTS = (
    Part("float64", 30, float64),
    Part("float32", 30, float32),
    Part("bf16", 40, bf16),
    Part("resume", 40, resume),
    Part("two-processes", 40, two_processes),
    Part("skip", 20, skip),
    Part("memory", 25, memory),
    Part("recipes", 100, recipes),
    Part("compiled", 60, compiled),
    Part("golden", 60, golden),
)


def failures(results: Results) -> list[str]:
    """What did not pass, one line each."""
    cut_off = [f"{name}: {how}" for name, how in results.ends.items() if not how.startswith("done")]
    checks = [(name, record) for name, records in results.parts.items() for record in records]
    return cut_off + [
        f"{name}: {record['check']}: {record['value']:g}, at most {record['bound']:g} {record['note']}"
        for name, record in checks
        if record["passed"] is False
    ]


def main() -> int:
    """Exit codes: 0 all checks passed, 1 one did not, 2 no GPU."""
    parsed = parse("benchmarks.gpu_check", __doc__, PARTS, "benchmarks/results")
    results = run_all("benchmarks.gpu_check", parsed, PARTS, "Checks of one GPU", SECONDS)
    if results is None:
        return 0
    failed = failures(results)
    print("\n".join(failed) or "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
