"""The samples of sample.py: their conditions, their pictures, and the .npz file that holds both.

n samples, K columns of the condition.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.images import image_grid, to_uint8
from pipeline.inference import announce
from pipeline.inference.folders import open_split
from pipeline.inference.labels import Labels, labeled
from pipeline.inference.latent_groups import TemperatureLike, listed
from pipeline.inference.parse_condition import check_attributes
from pipeline.inference.passes import images_per_pass
from pipeline.inference.readjust import readjusted_model
from pipeline.inference.trained import TrainedModel
from pipeline.models.conditions import UNKNOWN, AttributeCondition, ClassCondition
from pipeline.storage.atomic import atomic_file
from pipeline.storage.pictures import save_png
from shard_data.terminal import Progress, with_progress

log = logging.getLogger("pipeline")

MOST_SHOWN = 400
"""Samples in a picture; a .npz has them all."""


class Plan(NamedTuple):
    """The samples to make, in their order."""

    count: int
    condition: Tensor | None
    """(n, K)."""
    columns: int
    """Of the picture."""
    labels: np.ndarray | None = None
    """(n,) class numbers, of a class-conditional model."""
    attributes: np.ndarray | None = None
    """(n, K) 1, 0, or -1 for unknown, of an attribute-conditional model."""
    fixed_groups: int = 0
    """So many of the first latent groups are the same in all samples of a row of the picture."""
    caption: str = ""
    """Of the picture."""
    row_labels: Sequence[str] = ()
    """Of the picture: the class of each row."""


def plan_count(trained: TrainedModel, count: int) -> Plan:
    """`count` samples of a model without a condition. Raises ValueError for a conditional one."""
    return Plan(count, trained.condition(None, count), picture_columns(count))


def plan_classes(trained: TrainedModel, classes: Sequence[int] | None, per_class: int) -> Plan:
    """`per_class` samples of each of these classes (default: all), ordered by class; each is a row of the picture."""
    if not isinstance(trained.recipe.condition, ClassCondition):
        raise ValueError("the model was not trained with classes; leave out --classes and --per-class")
    if per_class < 1:
        raise ValueError(f"--per-class {per_class}: must be at least 1")
    numbers = range(trained.recipe.condition.num_classes) if classes is None else classes
    labels = np.repeat(np.asarray(numbers, np.int64), per_class)
    condition = trained.condition(torch.from_numpy(labels), len(labels))
    row_labels = [trained.classes[number] for number in numbers]
    return Plan(len(labels), condition, per_class, labels=labels, row_labels=row_labels)


def plan_attributes(
    trained: TrainedModel, target: Mapping[str, float], count: int, others: Tensor | None = None
) -> Plan:
    """`count` samples with the target attributes. The other attributes are those of the rows of `others` (m, K), which
    repeat, or unknown.
    """
    condition = trained.recipe.condition
    if not isinstance(condition, AttributeCondition):
        raise ValueError("the model was not trained with attributes; leave out --attributes and --data")
    check_attributes(target, condition)
    if others is None:
        others = torch.full((1, condition.size), UNKNOWN)
    rows = others.repeat(-(-count // len(others)), 1)[:count]
    rows = condition.changed(rows, target)
    known = torch.where(rows == UNKNOWN, -1, (rows > UNKNOWN).to(torch.int8))  # (n, K)
    conditions = trained.condition(rows, count)
    return Plan(count, conditions, picture_columns(count), attributes=known.to(torch.int8).numpy())


def sample_conditions(trained: TrainedModel, root: str, split: str, count: int) -> Tensor:
    """(m, K): the conditions of the first images of a shard set, at most `count` of them."""
    condition, shards = trained.recipe.condition, open_split(root, split)
    if condition is None:
        raise ValueError("the model was trained without a condition; leave out --data")
    condition.check(shards.classes or None, shards.attribute_names or None)
    first = range(min(count, len(shards)))
    labels, attributes = torch.from_numpy(shards.labels(first)), torch.from_numpy(shards.attributes(first))
    return condition.encode(labels, attributes, shards.attribute_names)


def with_fixed_groups(trained: TrainedModel, plan: Plan, count: int) -> Plan:
    """The plan with the first `count` latent groups shared by each row of the picture, which also shares its condition:
    both are those of the row's first sample.
    """
    if count == 0:
        return plan
    groups = trained.model.groups
    first = np.arange(plan.count) // plan.columns * plan.columns
    others = f"its images differ in {listed(groups[count:])}" if count < len(groups) else "which are all"
    return plan._replace(
        condition=None if plan.condition is None else plan.condition[torch.from_numpy(first).to(plan.condition.device)],
        attributes=None if plan.attributes is None else plan.attributes[first],
        fixed_groups=count,
        caption=f"Each row shares {listed(groups[:count])};\n{others}",
    )


def picture_columns(count: int) -> int:
    """8, or as many as make a large picture square."""
    return max(8, math.isqrt(min(count, MOST_SHOWN)))


def first_lines(
    trained: TrainedModel, plan: Plan, temperatures: Sequence[str], places: Sequence[Path | str | None]
) -> list[str]:
    """What is sampled, and where it is written."""
    return announce.first_lines(
        f"{plan.count:,} samples",
        trained.recipe.model.name,
        trained.step,
        trained.device,
        {
            "model": announce.weights_of(trained.place, trained.averaged),
            "temperature": ", ".join(temperatures),
            "writes": [str(place) for place in places if place],
        },
    )


def sample_images(trained: TrainedModel, plan: Plan, temperature: TemperatureLike, seed: int) -> np.ndarray:
    """uint8 (n, H, W, C)."""
    channels, height, width = trained.image_shape
    images = np.empty((plan.count, height, width, channels), np.uint8)
    size = plan.columns if plan.fixed_groups else images_per_pass(trained.device)
    starts = range(0, plan.count, size)
    for start in with_progress(starts, Progress("samples", len(starts), "batches", write=log.info)):
        stop = min(start + size, plan.count)
        condition = None if plan.condition is None else plan.condition[start:stop]
        fixed = []
        if plan.fixed_groups:
            alone = None if condition is None else condition[:1]
            fixed = trained.sample_with_latents(1, temperature, seed, alone, first=start)[1][: plan.fixed_groups]
        sampled = trained.sample(stop - start, temperature, seed, condition, first=start, fixed=fixed)
        images[start:stop] = to_uint8(sampled).permute(0, 2, 3, 1).numpy()
    return images


def readjusted(
    trained: TrainedModel, plan: Plan, temperature: TemperatureLike, seed: int, iterations: int
) -> TrainedModel:
    """A copy of the model whose batch norm's running statistics were moved to those of samples at this temperature."""

    def condition_of(numbers: Tensor) -> Tensor | None:
        return None if plan.condition is None else plan.condition[numbers.to(plan.condition.device)]

    return replace(trained, model=readjusted_model(trained, plan.count, condition_of, temperature, seed, iterations))


def picture(plan: Plan, images: np.ndarray) -> np.ndarray:
    """The grid of the samples, uint8 (height, width, 3), with a row of at most 20 for each class."""
    columns = plan.columns
    if plan.labels is not None:
        images = images.reshape(-1, columns, *images.shape[1:])[:, :20]
        columns = images.shape[1]
        images = images.reshape(-1, *images.shape[2:])
    images = images[:MOST_SHOWN]
    grid = image_grid(torch.from_numpy(images).permute(0, 3, 1, 2), columns)
    return labeled(grid, Labels(rows=plan.row_labels[: -(-len(images) // columns)], caption=plan.caption))


def save_picture(path: Path, plan: Plan, images: np.ndarray) -> None:
    """Writes `picture` as a PNG file, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, picture(plan, images))


def save_npz(path: Path, trained: TrainedModel, plan: Plan, images: np.ndarray, settings: Mapping[str, Any]) -> None:
    """What `python -m shard_data npz` reads: images, and labels or attributes with their names."""
    arrays = {"images": images, "settings": np.array(json.dumps(settings))}
    if plan.labels is not None:
        arrays |= {"labels": plan.labels, "classes": np.array(trained.classes)}
    if plan.attributes is not None:
        arrays |= {"attributes": plan.attributes, "attribute_names": np.array(trained.recipe.condition.chosen)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez(file, **arrays)
