"""The pictures of edit.py that show what latent groups decide."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.data.shards import TarShards
from pipeline.evaluation.images import to_uint8
from pipeline.inference.editing import Subject
from pipeline.inference.labels import LabeledImages, Labels
from pipeline.inference.latent_groups import (
    TemperatureLike,
    parse_first_groups,
    resolution,
    resolve_temperature,
    temperature_text,
)
from pipeline.inference.principal_directions import PrincipalDirections, group_noise, principal_directions
from pipeline.inference.trained import TrainedModel


def first_groups_picture(
    trained: TrainedModel, subjects: Sequence[Subject], words: Sequence[str], temperature: TemperatureLike, seed: int
) -> LabeledImages:
    """A row for each subject: the original, and its reconstructions from the first K latent groups.

    These are means of the posteriors. The other groups are sampled from their priors at `temperature`, 0 for the means.
    `words`: the values of K, as `parse_first_groups` reads them; none for all.
    """
    groups = trained.model.groups
    counts = [parse_first_groups(word, groups, "--keep-groups") for word in words] or range(len(groups) + 1)
    images, condition = torch.cat([subject.image for subject in subjects]), conditions_of(subjects)
    latents = trained.encode(images, condition, seed=None)
    columns = [
        trained.sample(len(images), temperature, seed, condition, fixed=latents[:count]) for count in counts
    ]  # (subjects, C, H, W) each
    tiles = torch.stack([images, *map(to_uint8, columns)], dim=1)  # (subjects, columns, C, H, W)
    names = ["no group", *(f"{k} of {len(groups)}\n{resolution(group)}" for k, group in enumerate(groups, start=1))]
    others = f"sampled at temperature {temperature_text(temperature)}" if temperature else "the means of their priors"
    return LabeledImages(
        tiles.flatten(0, 1),
        Labels(
            ["original", *(names[count] for count in counts)],
            caption=f"Reconstructions from the first latent groups;\nthe others are {others}",
        ),
    )


def traversal_picture(
    trained: TrainedModel,
    subjects: Sequence[Subject],
    group: int,
    found: PrincipalDirections,
    strengths: Tensor,
    temperature: TemperatureLike,
) -> LabeledImages:
    """For each subject a row for each direction: the original, then images with the group moved along the direction by
    each strength (n,), in standard deviations.

    Groups before it stay as they are. Those after it keep their noise, times their temperature, and so follow from
    their priors given the moved group. At temperature 1, strength 0 is the reconstruction.
    """
    name = trained.model.groups[group].name
    rows = []
    for subject in subjects:
        moved = traversed(trained, subject, group, found, strengths, temperature)
        rows += [torch.cat([subject.image, to_uint8(images)]) for images in moved]
    shares = [f"{d}: {share:.0%}" for d, share in enumerate(found.shares.tolist(), start=1)]
    return LabeledImages(
        torch.cat(rows),
        Labels(
            ["original", *(f"{strength:+g} sd" if strength else "0" for strength in strengths.tolist())],
            shares * len(subjects),
            f"{name} along its principal directions,\nwith their shares of its variance",
        ),
    )


def traversed(
    trained: TrainedModel,
    subject: Subject,
    group: int,
    found: PrincipalDirections,
    strengths: Tensor,
    temperature: TemperatureLike,
) -> list[Tensor]:
    """The images (n, C, H, W) of each direction."""
    later = resolve_temperature(temperature, trained.model.groups)[group + 1 :]
    temperatures = [1.0] * (group + 1) + list(later)
    latents = trained.encode(subject.image, subject.condition, seed=None)
    noise = trained.to_noise(latents, subject.condition)
    condition = None if subject.condition is None else subject.condition.expand(len(strengths), -1)
    images = []
    for direction, deviation in zip(found.directions, found.deviations, strict=True):
        rows = [part.expand(len(strengths), -1, -1, -1) for part in noise]
        steps = (strengths.double() * deviation).view(-1, 1, 1, 1) * direction  # (n, *group.shape)
        rows[group] = rows[group] + steps.to(rows[group])
        images.append(trained.from_noise(rows, temperatures, condition))
    return images


def find_directions(
    trained: TrainedModel, shards: TarShards, group: int, count: int, images: int
) -> PrincipalDirections:
    """The first `count` principal directions of a latent group over the first `images` of a split."""
    return principal_directions(group_noise(trained, shards, group, images), count)


def conditions_of(subjects: Sequence[Subject]) -> Tensor | None:
    """(n, K), or None for a model without a condition."""
    conditions = [subject.condition for subject in subjects]
    return None if conditions[0] is None else torch.cat(conditions)
