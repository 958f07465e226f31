"""Training steps of three small NVAEs: images per second and peak memory, in four variants.

    python -m benchmarks.training [--rounds 8] [--steps 3] [--cases cifar-small ...]

A step is forward, backward, regularizers and optimizer, on images that are already in memory. The variants:
  default      the trainer's defaults for the device
  bf16         with train.precision=bf16
  contiguous   with train.channels_last=false
  plain        a straightforward implementation (tests/models/nvae_restatement.py), contiguous, float32
Each variant has its own process. They run alternately, so that changes in the machine's speed affect all of them. Run
nothing else at the same time.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

CASES = {
    # options of the reference release, batch size
    "mnist-small": (
        {
            "dataset": "mnist",
            "num_latent_scales": 2,
            "num_groups_per_scale": 4,
            "ada_groups": True,
            "num_latent_per_group": 8,
            "num_channels_enc": 16,
            "num_channels_dec": 16,
            "num_cell_per_cond_enc": 1,
            "num_cell_per_cond_dec": 1,
            "num_preprocess_blocks": 2,
            "num_preprocess_cells": 3,
            "num_postprocess_blocks": 2,
            "num_postprocess_cells": 3,
        },
        16,
    ),
    "cifar-small": (
        {
            "dataset": "cifar10",
            "num_latent_scales": 1,
            "num_groups_per_scale": 6,
            "num_latent_per_group": 10,
            "num_channels_enc": 32,
            "num_channels_dec": 32,
            "num_cell_per_cond_enc": 2,
            "num_cell_per_cond_dec": 2,
        },
        8,
    ),
    "celeba-small": (
        {
            "dataset": "celeba_64",
            "num_latent_scales": 3,
            "num_groups_per_scale": 5,
            "ada_groups": True,
            "num_latent_per_group": 8,
            "num_channels_enc": 16,
            "num_channels_dec": 16,
            "num_cell_per_cond_enc": 1,
            "num_cell_per_cond_dec": 1,
            "num_nf": 1,
        },
        4,
    ),
}
COMMON = {
    "batch_size": 0,
    "weight_decay": 3e-4,
    "weight_decay_norm": 1e-2,
    "weight_decay_norm_init": 10.0,
    "weight_decay_norm_anneal": False,
    "arch_instance": "res_mbconv",
    "kl_anneal_portion": 0.3,
    "kl_const_portion": 1e-4,
    "kl_const_coeff": 1e-4,
    "num_nf": 0,
    "num_x_bits": 8,
    "ada_groups": False,
    "min_groups_per_scale": 1,
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_blocks": 1,
    "num_postprocess_cells": 2,
    "num_mixture_dec": 10,
    "use_se": True,
    "res_dist": True,
}
VARIANTS = ("default", "bf16", "contiguous", "plain")
TOTAL_STEPS = 1000


def reference_options(case: str) -> tuple[dict, int]:
    """The case's options, by their names in the reference release, and its batch size."""
    options, batch_size = CASES[case]
    return COMMON | options, batch_size


def random_images(case: str, batch_size: int) -> torch.Tensor:
    from tests.models.nvae_restatement_layout import image_shape

    shape = image_shape(reference_options(case)[0])
    images = torch.randint(0, 256, (batch_size, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return (images > 127) * torch.tensor(255, dtype=torch.uint8) if shape[0] == 1 else images


def build_ours(case: str, **train) -> Callable[[int], None]:
    """A function that takes one training step, given its number, with this project's trainer."""
    from benchmarks.steps import new_trainer
    from pipeline.data.loader import DataConfig
    from pipeline.recipe import Recipe
    from pipeline.training.optim import OptimConfig
    from pipeline.training.train_config import TrainConfig
    from tests.helpers.nvae_cases import nvae_from_reference

    options, batch_size = reference_options(case)
    model = nvae_from_reference(options)
    channels, side, _ = model.image_shape
    recipe = Recipe(
        model=model.config,
        data=DataConfig(size=side - 2 * model.border, channels=channels, pad=model.border, bits=model.bits),
        train=TrainConfig(steps=TOTAL_STEPS, batch_size=batch_size, seed=0, **train),
        optim=OptimConfig(warmup_steps=50),
    )
    trainer = new_trainer(recipe, images=random_images(case, batch_size))

    def step(number: int) -> None:
        assert trainer.train_step(number, [next(trainer.data.batches(number))]) is None

    return step


def build_plain(case: str) -> Callable[[int], None]:
    """A function that takes one training step, given its number, with the plain implementation."""
    from tests.models import nvae_restatement_training as spec
    from tests.models.nvae_restatement import Net
    from tests.models.nvae_restatement_layout import latent_shapes, parameter_order, random_state

    options, batch_size = reference_options(case)
    state = {k: v.float() if v.is_floating_point() else v for k, v in random_state(options, seed=0).items()}
    net = Net(options, spec.with_gradient(options, state), training=True)
    u = {
        n: torch.randn(len(net.state[f"{n}.weight"])) for names in spec.conv_matrices(net.state).values() for n in names
    }
    optimizer = torch.optim.Adamax(
        [net.state[n] for n in parameter_order(options)], lr=1e-4, eps=1e-3, weight_decay=3e-4, foreach=False
    )
    x = random_images(case, batch_size).float() / 255

    def step(number: int) -> None:
        noise = [torch.randn(batch_size, *shape) for shape in latent_shapes(options)]
        terms = spec.training_loss(net, x, noise, number, TOTAL_STEPS, u)
        optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        optimizer.step()
        u.update(terms["u"])

    return step


def serve(case: str, variant: str) -> None:
    """The process of a variant.

    For each line "first count" on standard input, takes these steps and prints their seconds and the peak memory.
    """
    settings = {"default": {}, "bf16": {"precision": "bf16"}, "contiguous": {"channels_last": False}}
    if variant == "plain":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        step = build_plain(case)
    else:
        step = build_ours(case, **settings[variant])
    for line in sys.stdin:
        first, count = map(int, line.split())
        start = time.perf_counter()
        for number in range(first, first + count):
            step(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = (
            torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        print(json.dumps([seconds, peak]), flush=True)


class VariantProcess:
    """The process of one variant, as seen by its parent."""

    def __init__(self, case: str, variant: str):
        command = [sys.executable, "-m", "benchmarks.training", "--serve", case, variant]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.peak, self.step = 0, 0

    def run(self, steps: int, counted: bool) -> None:
        self.process.stdin.write(f"{self.step} {steps}\n")
        self.process.stdin.flush()
        seconds, self.peak = json.loads(self.process.stdout.readline())
        self.step += steps
        if counted:
            self.seconds.append(seconds / steps)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def run_case(case: str, variants: list[str], rounds: int, steps: int) -> dict[str, VariantProcess]:
    """Runs all variants of a case alternately. The first round is a warm-up."""
    processes = {variant: VariantProcess(case, variant) for variant in variants}
    for number in tqdm(range(rounds + 1), desc=case, unit="round"):
        for process in processes.values():
            process.run(steps, counted=number > 0)
    for process in processes.values():
        process.close()
    return processes


def table(results: dict[str, dict[str, VariantProcess]]) -> str:
    """Markdown: median images/s, peak memory, and the median ratio to the default over the rounds."""
    lines = ["| case | variant | images/s | peak GiB | default is faster by |", "|---|---|---|---|---|"]
    ratios: dict[str, list[float]] = {}
    for case, processes in results.items():
        batch_size = reference_options(case)[1]
        default = processes["default"].seconds
        for variant, process in processes.items():
            ratio = statistics.median(a / b for a, b in zip(process.seconds, default, strict=True))
            ratios.setdefault(variant, []).append(ratio)
            speed = batch_size / statistics.median(process.seconds)
            lines.append(f"| {case} | {variant} | {speed:.1f} | {process.peak / 2**30:.2f} | {ratio:.2f} |")
    lines += [
        f"| geometric mean | {variant} | | | {statistics.geometric_mean(values):.2f} |"
        for variant, values in ratios.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="rounds that count (default 8)")
    parser.add_argument("--steps", type=int, default=3, help="training steps of each variant in a round (default 3)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="'default' is always included"
    )
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    variants = ["default", *(variant for variant in arguments.variants if variant != "default")]
    print(table({case: run_case(case, variants, arguments.rounds, arguments.steps) for case in arguments.cases}))


if __name__ == "__main__":
    main()
