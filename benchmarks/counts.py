"""What one training step costs a GPU, counted without one: operators, kernels, bytes, arithmetic, memory, collectives.

    python -m benchmarks.counts [--recipes nvae_cifar10 ...] [--processes 1 8] [--out counts.json] [--top 30]

The real trainer takes one step on fake tensors (benchmarks/fake_step.py), with bf16 autocast and channels_last, in the
middle of the KL warm-up, where the KL terms are balanced; optimizer and regularizers have state. Every operator is
counted, as one GPU of `--processes` runs it. No GPU and no memory for weights are needed. It is a model: autocast is
the CPU's, and what an operator launches on CUDA is a table (benchmarks/cuda_kernels.py).

The columns:
  operators     operators that launch at least one kernel; no views, no allocations
  kernels       what they launch, by the table
  GB/image      bytes read and written by all kernels: each operator reads its arguments once and writes its results
                once, plus the second passes that the table names; divided by the images per GPU
  GFLOP/image   3 times 2 times the multiply-adds of the forward pass; nothing for what is recomputed
  saved MB/image  storages that autograd saves in the forward pass, without parameters and buffers
  peak MB/image  the most memory that is alive at once of what the step makes: activations, gradients, temporaries; not
                the weights, the optimizer's state and the moving average
  collectives   calls per step, and the MB that one rank contributes to them
The penalty's backward pass is part of phase `backward`.

An estimate, not a measurement, follows: milliseconds per step for the launches, the bytes and the arithmetic of one
H200, each on its own. No step can be faster than the largest of them. Communication is not in it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.fake_step import fake_processes, fake_trainer, middle_of_warmup, prime
from benchmarks.step_counter import StepCounter, labelled
from benchmarks.steps import COUNTED, IMAGES_PER_GPU
from pipeline.recipe import Recipe, load_recipe, recipe_path, shipped_recipes

# Of one H200.
SECONDS_PER_LAUNCH = 5e-6
BYTES_PER_SECOND = 4.8e12
FLOPS_PER_SECOND = 989e12 * 0.4  # peak of dense bf16, and the share of it that these convolutions may reach


def read_recipe(name: str, world_size: int, overrides: Sequence[str] = ()) -> Recipe:
    """The shipped recipe in bf16 with the paper's batch per GPU, one forward pass per step."""
    ours = ["train.precision=bf16", "train.micro_batch=null", "regularizers.first_power_iterations=1"]
    if name in IMAGES_PER_GPU:
        ours.append(f"train.batch_size={IMAGES_PER_GPU[name] * world_size}")
    return load_recipe(recipe_path(name), [*ours, *overrides])


def count_step(recipe: Recipe, world_size: int) -> StepCounter:
    """One step of one of `world_size` processes."""
    images = recipe.train.images_per_pass // world_size
    with fake_processes(world_size):
        trainer = fake_trainer(recipe, world_size)
        prime(trainer, middle_of_warmup(recipe))
        steps = [state["step"] for state in trainer.state.optimizer.state.values()]
        on_device = any(group.get("fused") or group.get("capturable") for group in trainer.state.optimizer.param_groups)
        counter = StepCounter([] if on_device else steps)
        with trainer.runtime.fake:
            batch = trainer.data.batch(images, trainer.model.image_shape)
            with labelled(trainer, counter), counter, counter.saved_tensors():
                trainer.train_step(middle_of_warmup(recipe), [batch] * recipe.train.micro_batches)
        for tensor in [*trainer.model.parameters(), *trainer.model.buffers()]:
            counter.saved.pop(tensor.untyped_storage()._cdata, None)
    return counter


def figures(counter: StepCounter, images: int) -> dict[str, Any]:
    """The table's figures, as JSON."""

    def sums(phases: Sequence[str]) -> dict[str, Any]:
        return {
            "operators": sum(counter.operators[phase].total() for phase in phases),
            "kernels": sum(counter.kernels[phase].total() for phase in phases),
            "gb_per_image": round(sum(counter.bytes[phase].total() for phase in phases) / 1e9 / images, 4),
        }

    phases = list(counter.operators)
    return {
        "images_per_gpu": images,
        **sums(phases),
        "gflop_per_image": round(3 * counter.forward_flops / 1e9 / images, 3),
        "saved_mb_per_image": round(sum(counter.saved.values()) / 1e6 / images, 2),
        "peak_mb_per_image": round(counter.memory.peak / 1e6 / images, 2),
        "collectives": {
            name: {"calls": calls, "mb": round(counter.collective_bytes[name] / 1e6, 3)}
            for name, calls in sorted(counter.collectives.items())
        },
        "phases": {phase: sums([phase]) for phase in sorted(phases)},
    }


def estimate(of: dict[str, Any]) -> dict[str, float]:
    """Milliseconds per step of one H200 for each of three limits. Not a measurement."""
    images = of["images_per_gpu"]
    return {
        "launches": 1e3 * of["kernels"] * SECONDS_PER_LAUNCH,
        "bytes": 1e12 * of["gb_per_image"] * images / BYTES_PER_SECOND,
        "arithmetic": 1e12 * of["gflop_per_image"] * images / FLOPS_PER_SECOND,
    }


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown: a row for each recipe and number of processes, then their phases, then the estimate."""
    rows = [(f"{name}, {world}", of) for name, by_world in results.items() for world, of in by_world.items()]
    columns = "recipe, processes|images/GPU|operators|kernels|GB/image|GFLOP/image|saved MB/image|peak MB/image"
    columns += "|collectives|their MB"
    lines = [f"|{columns}|", "|---" * 10 + "|"]
    for name, of in rows:
        calls, mb = (sum(one[key] for one in of["collectives"].values()) for key in ("calls", "mb"))
        lines.append(
            f"| {name} | {of['images_per_gpu']} | {of['operators']:,} | {of['kernels']:,} | {of['gb_per_image']:.2f} | "
            f"{of['gflop_per_image']:.1f} | {of['saved_mb_per_image']:.0f} | "
            f"{of['peak_mb_per_image']:.0f} | {calls:,} | {mb:,.1f} |"
        )
    lines += ["", "Kernels (GB/image) by phase", "", phase_table(rows), "", ESTIMATE_HEAD, "", estimate_table(rows)]
    return "\n".join(lines)


def phase_table(rows: list[tuple[str, dict]]) -> str:
    phases = sorted({phase for _, of in rows for phase in of["phases"]})
    lines = ["| recipe | " + " | ".join(phases) + " |", "|---" * (len(phases) + 1) + "|"]
    for name, of in rows:
        cells = [of["phases"].get(phase, {"kernels": 0, "gb_per_image": 0}) for phase in phases]
        lines.append(f"| {name} | " + " | ".join(f"{c['kernels']:,} ({c['gb_per_image']:.3f})" for c in cells) + " |")
    return "\n".join(lines)


ESTIMATE_HEAD = (
    f"Estimate, not measured: ms per step of one H200 at {SECONDS_PER_LAUNCH * 1e6:g} us per launch, "
    f"{BYTES_PER_SECOND / 1e12:g} TB/s, {FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s; images/s per GPU by the largest of them"
)


def estimate_table(rows: list[tuple[str, dict]]) -> str:
    lines = ["| recipe | launches | bytes | arithmetic | images/s at most |", "|---|---|---|---|---|"]
    for name, of in rows:
        limits = estimate(of)
        speed = 1e3 * of["images_per_gpu"] / max(limits.values())
        lines.append(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in limits.values()) + f" | {speed:,.0f} |")
    return "\n".join(lines)


def top_operators(counter: StepCounter, images: int, number: int) -> str:
    """The operators with the most kernels of each phase, with their MB per image."""
    lines = ["| phase | operator | calls | kernels | MB/image |", "|---|---|---|---|---|"]
    rows = [(phase, name) for phase, names in counter.kernels.items() for name in names]
    for phase, name in sorted(rows, key=lambda row: -counter.kernels[row[0]][row[1]])[:number]:
        calls, launched, moved = (of[phase][name] for of in (counter.operators, counter.kernels, counter.bytes))
        lines.append(f"| {phase} | {name} | {calls:,} | {launched:,} | {moved / 1e6 / images:,.1f} |")
    return "\n".join(lines)


def main() -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipes", nargs="+", default=COUNTED, choices=shipped_recipes(), metavar="NAME",
        help=f"shipped recipes (default: {', '.join(COUNTED)})",
    )  # fmt: skip
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 8], metavar="N", help="default: 1 8")
    parser.add_argument("--recompute", help="train.recompute of all recipes")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="settings of all recipes")
    parser.add_argument(
        "--top", type=int, default=0, metavar="N", help="also print the N operators with the most kernels"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parsed = parser.parse_args()
    overrides = [*parsed.set, *([f"train.recompute={parsed.recompute}"] if parsed.recompute else [])]
    results: dict[str, dict[str, dict]] = {}
    for name in parsed.recipes:
        for world_size in parsed.processes:
            start = time.perf_counter()
            try:
                recipe = read_recipe(name, world_size, overrides)
            except ValueError as error:
                parser.error(str(error))
            counter = count_step(recipe, world_size)
            images = recipe.train.images_per_pass // world_size
            results.setdefault(name, {})[str(world_size)] = figures(counter, images)
            print(f"{name}, {world_size}: counted in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            if parsed.top:
                print(f"{name}, {world_size}\n\n{top_operators(counter, images, parsed.top)}\n")
    print(table(results))
    if parsed.out:
        facts = {"torch": torch.__version__.partition("+")[0], "settings": overrides, "recipes": results}
        parsed.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
