"""Seconds of CPU time that a training step of each of several recipes takes, and their parameters.

    python -m benchmarks.recipe_steps nvae vdvae_small [--threads 1] [--rounds 5]

The recipes take steps in turns, on images in memory, so that changes in the machine's speed affect all of them. CPU
time of all threads is counted, which other load changes less than the time that passes.
"""

import argparse
import statistics
import sys
import time

from benchmarks.steps import new_trainer, read_recipe, train
from pipeline.recipe import shipped_recipes


def main() -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe_steps",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="+", choices=shipped_recipes(), metavar="RECIPE")
    parser.add_argument("--threads", type=int, default=1, help="of each step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of two steps that count (default: %(default)s)")
    parsed = parser.parse_args()
    trainers, seconds = {}, {}
    for name in parsed.recipes:
        recipe = read_recipe(name, f"train.cpu_threads={parsed.threads}")
        first = next(iter(trainers.values()), None)
        trainers[name], seconds[name] = new_trainer(recipe, first and first.runtime), []
        train(trainers[name], 1)
    for _ in range(parsed.rounds):
        for name, trainer in trainers.items():
            start = time.process_time()
            train(trainer, 2)
            seconds[name].append((time.process_time() - start) / 2)
    for name, trainer in trainers.items():
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        images, median = trainer.config.batch_size, statistics.median(seconds[name])
        print(f"{name}: {parameters:,} parameters; {images} images per step; {median:.3f} s of CPU time per step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
