"""Importance samples: draws that reuse the encoder against a loop of full passes, in draws per second.

    python -m benchmarks.draws [--recipe nvae_mnist_small] [--images 32] [--draws 20] [--rounds 7]

Both compute bounds of the same images from the same noise. They run alternately, so that changes in the machine's speed
affect both. Run nothing else at the same time.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.steps import new_trainer, read_recipe, sample_noise
from pipeline.evaluation.likelihood_bounds import Draws


def measure(model: nn.Module, x: Tensor, draws: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round, reusing the encoder and not. The first round is a warm-up and does not count."""
    noise = sample_noise(model, len(x), x.device, x.dtype)

    def reusing() -> None:
        Draws(model, x, None, lambda draw: noise).log_likelihood(draws, rows=len(x))

    def full_passes() -> None:
        for _ in range(draws):
            model(x, noise)

    seconds = [(timed(reusing), timed(full_passes)) for _ in tqdm(range(rounds + 1), unit="round", disable=None)]
    reused, full = zip(*seconds[1:], strict=True)
    return list(reused), list(full)


@torch.no_grad()
def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.draws", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="nvae_mnist_small", help="of an unconditional model (default: %(default)s)")
    parser.add_argument("--images", type=int, default=32, help="in a batch (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=20, help="of each image (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: %(default)s)")
    parsed = parser.parse_args()
    trainer = new_trainer(read_recipe(parsed.recipe, f"train.batch_size={parsed.images}"))
    x, _ = trainer.data.model_inputs(next(iter(trainer.data.batches(0))))
    reused, full = measure(trainer.model.eval(), x, parsed.draws, parsed.rounds)
    ratio = statistics.median(b / a for a, b in zip(reused, full, strict=True))
    passes = parsed.images * parsed.draws
    print(f"{parsed.recipe}, {parsed.images} images, {parsed.draws} draws of each")
    print(f"reusing the encoder {passes / statistics.median(reused):8.1f} draws/s")
    print(f"full passes         {passes / statistics.median(full):8.1f} draws/s")
    print(f"ratio {ratio:.2f} (median of {parsed.rounds} rounds)")


if __name__ == "__main__":
    main()
