"""Counts the memory of a step of the paper's recipes, and writes the figures that `train.py --dry-run` uses.

    python -m benchmarks.step_memory

The peak is counted on fake tensors (benchmarks/counts.py) with the paper's batch per GPU (two images for one) and with
half of it, in the recipe's precision: the difference is what images add, the rest (copies of weights) what a step adds
whatever its batch; with recomputation the rest is taken to be the same. The peak is at the end of the forward pass,
before the first gradient, so gradients that accumulate come on top. Run it after a change to a model, to a recipe or to
the trainer; it takes some minutes. Settings without figures are estimated more coarsely.
"""

import argparse
import json
import sys

import torch

from benchmarks.counts import count_step, read_recipe
from benchmarks.steps import COUNTED as NVAE_RECIPES
from benchmarks.steps import IMAGES_PER_GPU, VDVAE_IMAGES_PER_GPU
from pipeline.recipe import Recipe, load_recipe, recipe_path
from pipeline.run.step_memory import COUNTED, key_of, kinds_of_recomputation, meta_model

RECIPES = (*NVAE_RECIPES, *VDVAE_IMAGES_PER_GPU)


def count_peaks(name: str) -> dict[str, dict]:
    """{key of the settings: figures} of a recipe, with each kind of recomputation that its model has."""
    images = max(2, (IMAGES_PER_GPU | VDVAE_IMAGES_PER_GPU)[name])
    own, fixed, figures = load_recipe(recipe_path(name), []), 0, {}
    for recompute in kinds_of_recomputation(meta_model(own)):
        recipe = read_recipe(name, 1, [f"train.recompute={recompute}", f"train.precision={own.train.precision}"])
        peak = peak_of(recipe, images)
        if recompute == "none":
            fixed = peak - 2 * (peak - peak_of(recipe, images // 2))
        facts = {"recipe": name, "precision": recipe.train.precision, "recompute": recompute}
        figures[key_of(recipe, meta_model(recipe))] = facts | {"fixed": fixed, "per_image": (peak - fixed) // images}
        print(f"{name}, {recompute}: {peak / images / 1e6:.0f} MB per image", file=sys.stderr)
    return figures


def peak_of(recipe: Recipe, images: int) -> int:
    """Bytes that a step of this many images makes and that are alive at once."""
    train = recipe.train.model_copy(update={"batch_size": images})
    return count_step(recipe.model_copy(update={"train": train}), 1).memory.peak


def main() -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_memory",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parsed = parser.parse_args()
    figures = json.loads(COUNTED.read_text())["figures"] if COUNTED.is_file() else {}
    figures = {key: one for key, one in figures.items() if one["recipe"] not in parsed.recipes}
    for name in parsed.recipes:
        figures |= count_peaks(name)
    text = json.dumps({"torch": torch.__version__.partition("+")[0], "figures": figures}, indent=1)
    COUNTED.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
