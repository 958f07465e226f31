"""What `train.py --dry-run` prints of a run."""

import torch

from pipeline.recipe import Recipe, build_model


def describe(recipe: Recipe) -> str:
    """What --dry-run prints of a recipe's model: parameters, groups and memory."""
    with torch.device("meta"):
        model = build_model(recipe)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    copies = 4 + bool(recipe.train.ema_decay)  # weights, gradients, two moments of the optimizer, moving average
    mib = 4 * parameters / 2**20
    averaged = " and moving average" if recipe.train.ema_decay else ""
    dimensions = sum(torch.Size(group.shape).numel() for group in model.groups)
    lines = [
        f"model       {recipe.model.name}: {parameters:,} parameters in {len(list(model.parameters()))} tensors",
        f"memory      {mib:,.1f} MiB of weights; {copies * mib:,.1f} MiB with gradients, optimizer{averaged}",
        f"latents     {len(model.groups)} groups, {dimensions:,} dimensions",
        *(f"  {group.name:<18} {'x'.join(map(str, group.shape))}" for group in model.groups),
    ]
    return "\n".join(lines)
