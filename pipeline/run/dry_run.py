"""What `train.py --dry-run` prints of a run: its settings, model, data and length. Nothing is made or written."""

import os
from pathlib import Path

import torch

from pipeline.config import dump
from pipeline.data.holdout import num_held_out
from pipeline.data.remote import FetchError, check_address, fetch_manifest, is_address
from pipeline.models.base import VAE
from pipeline.recipe import Recipe, total_steps
from pipeline.run.data import check_set
from pipeline.run.step_memory import estimate, meta_model, readable
from pipeline.storage.status import read_status
from pipeline.training.optim import LearningRate
from shard_data import manifest as manifests


class DataMissing(Exception):
    """The shard set cannot be read here; the message says why, and how it is made."""


def describe(recipe: Recipe, folder: Path, all_settings: bool = False) -> str:
    """The text of a dry run in the run folder `folder`. Raises ValueError where the data do not fit the recipe."""
    kept = "all settings" if all_settings else "settings that differ from the defaults; --dry-run-all prints all"
    lines = [f"# {kept}", dump(recipe, defaults=all_settings), *describe_model(recipe)]
    try:
        manifest = read_manifest(recipe)
    except DataMissing as error:
        lines += [f"data        {error}", *describe_length(recipe, None)]
    else:
        check_set(recipe, manifest, recipe.data.root)
        counts = describe_counts(recipe, manifest)
        image = "{height}x{width}x{channels}".format(**manifest["image"])
        lines += [f"data        {recipe.data.root}: images of {image}; {counts}"]
        lines += describe_length(recipe, num_trained_on(recipe, manifest))
    return "\n".join([*lines, describe_folder(folder)])


def describe_counts(recipe: Recipe, manifest: manifests.Manifest) -> str:
    """Images of the training and the validation split."""
    splits, data = manifest["splits"], recipe.data
    if data.holdout:
        trained_on = num_trained_on(recipe, manifest)
        return f"{data.train_split} {trained_on:,}; {splits[data.train_split]['count'] - trained_on:,} held out as val"
    return ", ".join(f"{name} {splits[name]['count']:,}" for name in {data.train_split: 0, recipe.validation.split: 0})


def num_trained_on(recipe: Recipe, manifest: manifests.Manifest) -> int:
    """Images of the training split without those held out."""
    count = manifest["splits"][recipe.data.train_split]["count"]
    return count - num_held_out(recipe.data.holdout, count) if recipe.data.holdout else count


def describe_model(recipe: Recipe) -> list[str]:
    """Parameters, memory and latent groups."""
    model = meta_model(recipe)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dimensions = sum(torch.Size(group.shape).numel() for group in model.groups)
    return [
        f"model       {recipe.model.name}: {parameters:,} parameters in {len(list(model.parameters()))} tensors",
        *describe_memory(recipe, model, 4 * parameters),
        f"latents     {len(model.groups)} group{'s' * (len(model.groups) > 1)}, {dimensions:,} dimensions",
        *(f"  {group.name:<18} {'x'.join(map(str, group.shape))}" for group in model.groups),
    ]


def describe_memory(recipe: Recipe, model: VAE, weights: int) -> list[str]:
    """The weights, and an estimate of the peak of a training step. `weights`: their bytes."""
    lines = [f"memory      {weights / 2**20:,.1f} MiB of weights"]
    found = estimate(recipe, model=model)
    if found is None:
        return [*lines, "  a step's memory has not been counted for these settings (python -m benchmarks.step_memory)"]
    averaged = ", moving average" if recipe.train.ema_decay else ""
    fixed = found.fixed + found.gradients * found.accumulates
    kinds = "gradients and temporary weights" if found.accumulates else "temporary weights"
    others = f"{kinds} {readable(fixed)}" if fixed >= 2**20 else "no gradients at that moment"
    parts = f"weights, optimizer{averaged} {readable(found.state)}, {others}"
    lines += [f"  a step's peak, estimated: {parts}, and {readable(found.per_image)} for each image"]
    if recipe.train.micro_batch == "auto":
        return [*lines, "  train.micro_batch=auto: the largest that fits is found when the run starts"]
    images = recipe.train.images_per_pass
    for processes in process_counts(images):
        peak = found.peak(images // processes, processes)
        name = "process" if processes == 1 else "processes"
        share = f"{images // processes} image{'s' * (images > processes)} each"
        lines += [f"  {readable(peak):>10} on each GPU with {processes} {name}, {share}"]
    return lines


def process_counts(images: int) -> list[int]:
    """The number of processes that were launched, or those that are usual on one machine, and the paper's 24, that can
    share the images.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    counts = [launched] if launched > 1 else [1, 2, 4, 8, 24]
    return [count for count in counts if images % count == 0]


def describe_length(recipe: Recipe, epoch_size: int | None) -> list[str]:
    """Steps, epochs and warm-up. `epoch_size`: images of the training split; None where it is not known."""
    train, optim = recipe.train, recipe.optim
    if epoch_size is None:
        length = f"{train.steps:,} steps" if train.steps else f"{train.epochs:g} epochs (steps depend on the data)"
        return [f"length      {length}, {train.batch_size} images per step"]
    steps, per_epoch = total_steps(recipe, epoch_size), epoch_size / train.batch_size
    warmup = LearningRate(optim, steps, per_epoch).warmup_steps
    lines = [f"length      {steps:,} steps = {steps / per_epoch:.4g} epochs, {train.batch_size} images per step"]
    if warmup:
        lines += [f"warm-up     {warmup:,} steps = {warmup / per_epoch:.4g} epochs"]
    return lines


def describe_folder(folder: Path) -> str:
    """Whether the command would start or continue a run."""
    status = read_status(folder)
    if status.state == "none":
        return f"run folder  {folder}: new"
    return f"run folder  {folder}: {status.state}, checkpoint of step {status.step:,} of {status.total_steps:,}"


def read_manifest(recipe: Recipe) -> manifests.Manifest:
    """The manifest of the recipe's shard set. Raises DataMissing, or ValueError where it is invalid."""
    root, source = recipe.data.root, recipe.data.source
    if root is None:
        raise DataMissing("the recipe names no shard set; give one with --data DIR")
    if is_address(root):
        address = check_address(root)
        try:
            return manifests.parse(fetch_manifest(address), address)
        except FetchError as error:
            raise DataMissing(str(error)) from None
    if not (Path(root) / manifests.FILE).is_file():
        command = f"; make it with: python -m shard_data {source} --out {root}" if source else ""
        raise DataMissing(f"{root} is not there or not complete (no {manifests.FILE}){command}")
    return manifests.load(Path(root))
