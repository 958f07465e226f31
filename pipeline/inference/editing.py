"""The edits of edit.py: a picture under another condition, moved along a direction, or interpolated with another."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.shards import TarShards
from pipeline.inference.infer_condition import infer_attributes, infer_class
from pipeline.inference.latents import Latents, MeanDifference, added, linear, moved, spherical
from pipeline.inference.parse_condition import check_attributes, check_strength, class_number, parse_settings
from pipeline.inference.passes import IMAGES_PER_PASS
from pipeline.inference.trained import TrainedModel
from pipeline.models.conditions import ClassCondition, find_name
from shard_data.terminal import Progress, with_progress

log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Subject:
    """A picture to edit."""

    name: str
    image: Tensor
    """uint8 (1, C, H, W)."""
    condition: Tensor | None
    """(1, K): of the unedited picture; None for a model without a condition."""


def known_condition(trained: TrainedModel, image: Tensor, words: Sequence[str]) -> tuple[Tensor | None, str]:
    """The condition (1, K) of an image (1, C, H, W), of which the user knows `words`; the rest is inferred.

    The second value describes what was inferred. `words`: `Smiling=1`, or a class. Raises ValueError for classes and
    attributes that the model does not have.
    """
    condition = trained.recipe.condition
    if condition is None:
        if words:
            raise ValueError("--known: the model was trained without a condition; leave it out")
        return None, ""
    if isinstance(condition, ClassCondition):
        number = single_class(trained, words) if words else infer_class(trained, image)
        return trained.condition(number, 1), "" if words else f"class {trained.classes[number]}"
    known = parse_settings(",".join(words))
    check_attributes(known, condition)
    found = infer_attributes(trained, image, known)
    inferred = [name for name in condition.chosen if name not in known]
    present = ", ".join(name for name in inferred if found[name] > 0.5) or "none"
    row = torch.tensor([[found[name] for name in condition.chosen]])
    return trained.condition(row, 1), f"{present} of {len(inferred)}" if inferred else ""


def target_condition(trained: TrainedModel, start: Tensor, words: Sequence[str]) -> Tensor:
    """The condition (1, K) that `--set` makes of a picture's own, `start`. Raises ValueError for unknown names."""
    condition = trained.recipe.condition
    if isinstance(condition, ClassCondition):
        return trained.condition(single_class(trained, words), 1)
    settings = parse_settings(",".join(words))
    check_attributes(settings, condition)
    return condition.changed(start, settings)


def single_class(trained: TrainedModel, words: Sequence[str]) -> int:
    """The number of the one class that the words name."""
    if len(words) != 1:
        raise ValueError(f"{', '.join(words)}: a picture has one class; give one")
    return class_number(words[0], trained.classes)


def edit_by_condition(trained: TrainedModel, subject: Subject, words: Sequence[str], strengths: Tensor) -> Tensor:
    """(n, C, H, W): the picture's latents decoded under conditions between its own and the target.

    Strength 0 is the reconstruction, 1 the edit. Raises ValueError for strengths outside [0, 1].
    """
    if not bool(((strengths >= 0) & (strengths <= 1)).all()):
        raise ValueError("--strength: for a conditional model, from 0 (unchanged) to 1 (the target)")
    target = target_condition(trained, subject.condition, words)
    (conditions,) = linear([subject.condition], [target], strengths)  # (n, K)
    latents = trained.encode(subject.image, subject.condition, seed=None)
    return trained.decode([group.expand(len(strengths), *group.shape[1:]) for group in latents], conditions)


def edit_by_direction(trained: TrainedModel, subject: Subject, direction: Latents, strengths: Tensor) -> Tensor:
    """(n, C, H, W): the picture's latents moved along a direction by each strength, of any value."""
    return trained.decode(moved(trained.encode(subject.image, seed=None), direction, strengths))


def find_direction(
    trained: TrainedModel, shards: TarShards, settings: Mapping[str, float], images: int
) -> list[Tensor]:
    """The sum over attributes of the mean latent with minus without, from the first images of a set; with the opposite
    sign for attributes set to 0.

    Raises ValueError for an attribute that the set does not have, a strength outside [0, 1], and if all images have it
    or none.
    """
    for name, value in settings.items():
        check_strength(name, value)
    names = shards.attribute_names
    columns = {name: names.index(find_name(name, names, f"attribute of {shards.root}")) for name in settings}
    differences = {name: MeanDifference() for name in settings}
    starts = range(0, min(images, len(shards)), IMAGES_PER_PASS)
    for start in with_progress(starts, Progress("mean latents", len(starts), "batches", write=log.info)):
        here = range(start, min(start + IMAGES_PER_PASS, images, len(shards)))
        latents = trained.encode(torch.from_numpy(shards.images(here).transpose(0, 3, 1, 2).copy()), seed=None)
        attributes = torch.from_numpy(shards.attributes(here)).masked_fill(torch.from_numpy(shards.hidden(here)), -1)
        for name, difference in differences.items():
            difference.add(latents, attributes[:, columns[name]])
    directions = []
    for name, difference in differences.items():
        try:
            directions.append((2.0 * settings[name] - 1.0, difference.direction()))
        except ValueError as error:
            raise ValueError(f"{name}: {error}; read more with --images") from None
    return [group.to(trained.dtype) for group in added(directions)]


def interpolate(trained: TrainedModel, start: Subject, end: Subject, steps: int) -> tuple[Tensor, Tensor]:
    """Linear and spherical interpolation between two pictures, (steps, C, H, W) each, ends included. The condition is
    interpolated linearly.
    """
    weights = torch.linspace(0, 1, steps)
    conditions = None
    if start.condition is not None:
        (conditions,) = linear([start.condition], [end.condition], weights)
    ends = [trained.encode(subject.image, subject.condition, seed=None) for subject in (start, end)]
    return trained.decode(linear(*ends, weights), conditions), trained.decode(spherical(*ends, weights), conditions)


def sample_conditions(trained: TrainedModel, shards: TarShards, indices: Sequence[int]) -> Tensor | None:
    """The conditions (n, K) of samples of a set, 1/2 for unknown attributes; None for a model without a condition."""
    condition = trained.recipe.condition
    if condition is None:
        return None
    condition.check(shards.classes or None, shards.attribute_names or None)
    labels, attributes = torch.from_numpy(shards.labels(indices)), torch.from_numpy(shards.attributes(indices))
    return trained.condition(condition.encode(labels, attributes, shards.attribute_names), len(indices))


def find_sample(shards: TarShards, wanted: str) -> int:
    """The number of a sample given by its key, or by its number. Raises ValueError where there is none."""
    if wanted.isdecimal() and int(wanted) < len(shards):
        return int(wanted)
    for start in range(0, len(shards), 10_000):
        keys = shards.keys(range(start, min(start + 10_000, len(shards))))
        if wanted in keys:
            return start + keys.index(wanted)
    example = shards.keys([0])[0]
    raise ValueError(
        f"--key {wanted}: split '{shards.split}' of {shards.root} has no such sample; "
        f"keys are like {example}, numbers are 0 to {len(shards) - 1}"
    )
