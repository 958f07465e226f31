"""Importance samples: draws that reuse the encoder against a loop of full passes, in images times draws per second.

    python -m benchmarks.draws [--recipe nvae_mnist_small] [--images 32] [--draws 20] [--rounds 7]

Both compute the same bounds of the same images, from the same noise. They run alternately, so that changes in the
machine's speed affect both. Run nothing else at the same time.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.distributed.runtime import cores_per_process
from pipeline.evaluation.likelihood_bounds import Draws
from pipeline.models.base import VAE, use_channels_last
from pipeline.models.noise import draw_noise
from pipeline.recipe import build_model, load_recipe, recipe_path


def build(name: str) -> VAE:
    """The recipe's model with random weights, ready for evaluation."""
    recipe = load_recipe(recipe_path(name), [])
    torch.manual_seed(0)
    model = build_model(recipe)
    if recipe.train.channels_last:
        use_channels_last(model)
    return model.eval().requires_grad_(False)


def measure(model: VAE, x: Tensor, draws: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round, reusing the encoder and not. The first round is a warm-up and does not count."""

    def noise(draw: int) -> list[Tensor]:
        return draw_noise(model.noise_groups, 0, f"validate/{draw}", range(len(x)))

    def reusing() -> None:
        Draws(model, x, None, noise).log_likelihood(draws, rows=len(x))

    def full_passes() -> None:
        for draw in range(draws):
            model(x, noise(draw))

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
    torch.set_num_threads(cores_per_process())
    model = build(parsed.recipe)
    x = torch.rand(parsed.images, *model.image_shape).contiguous(memory_format=torch.channels_last).round()
    reused, full = measure(model, x, parsed.draws, parsed.rounds)
    ratio = statistics.median(b / a for a, b in zip(reused, full, strict=True))
    passes = parsed.images * parsed.draws
    print(f"{parsed.recipe}, {parsed.images} images, {parsed.draws} draws of each")
    print(f"reusing the encoder {passes / statistics.median(reused):8.1f} draws/s")
    print(f"full passes         {passes / statistics.median(full):8.1f} draws/s")
    print(f"ratio {ratio:.2f} (median of {parsed.rounds} rounds in turn)")


if __name__ == "__main__":
    main()
