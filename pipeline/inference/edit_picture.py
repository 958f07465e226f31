"""The pictures that edit.py writes: edits, interpolations between two images, and what latent groups decide."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.shards import TarShards
from pipeline.evaluation.images import enlarged, to_uint8
from pipeline.inference import announce, editing
from pipeline.inference.editing import Subject
from pipeline.inference.folders import open_split
from pipeline.inference.group_pictures import find_directions, first_groups_picture, traversal_picture
from pipeline.inference.labels import LabeledImages, Labels
from pipeline.inference.latent_groups import find_group
from pipeline.inference.parse_condition import parse_settings
from pipeline.inference.read_image import open_picture
from pipeline.inference.text import printable
from pipeline.inference.trained import TrainedModel
from pipeline.storage.pictures import check_animation, save_animation, save_png

log = logging.getLogger("pipeline")
ANIMATION_SIDE = 256
"""Pixels. Frames of smaller images are enlarged by a whole factor."""
MILLISECONDS, END_MILLISECONDS = 60, 600
"""That a frame of an animation is shown; of an end."""


class EditRequest(NamedTuple):
    """What to edit, and how."""

    files: Sequence[Path]
    """Image files to edit."""
    known: Sequence[str]
    """Their known attributes (`Smiling=1`) or class; the others are inferred."""
    data: str | None
    """Shard set of `keys`, and of the mean differences of an unconditional model."""
    split: str
    """Split of `data`."""
    keys: Sequence[str]
    """Samples of `data` to edit, by key or number."""
    edits: Sequence[str]
    """Attributes (`Smiling=1`) or class to set."""
    kept: Sequence[str] | None
    """How many of the first latent groups reconstructions keep, as `parse_first_groups` reads it; empty for each number
    of them."""
    traversed: str | None
    """Latent group to move along its principal directions. Without edits and groups, two images are interpolated."""
    directions: int
    """Principal directions."""
    temperature: float | Mapping[str, float] | None
    """Of the groups that follow from their priors. Default: 0 where groups are kept, 1 where one is moved."""
    seed: int
    """Of the noise of the groups that are not kept."""
    strengths: Tensor
    """(n,) strengths of the edit."""
    steps: int
    """Images of an interpolation."""
    frames: int
    """Images of the animation of an interpolation, from one end to the other."""
    num_images: int
    """Images of `data` for the mean differences, and for the principal directions."""


def first_lines(trained: TrainedModel, request: EditRequest, writes: Path) -> list[str]:
    """What is made of which images, by which model, and where it is written."""
    what, edit = _describe_edit(request)
    read = f"{request.data}, split {request.split}" if request.data else ""
    if request.traversed is not None or (request.edits and trained.recipe.condition is None):
        read += f"; {request.num_images:,} images at most for the directions"
    return announce.first_lines(
        what,
        trained.recipe.model.name,
        trained.step,
        trained.device,
        {
            "model": announce.weights_of(trained.place, trained.averaged),
            "images": announce.some_of([*map(str, request.files), *request.keys]),
            "data": read,
            "edit": printable(edit),
            "writes": str(writes),
        },
    )


def _describe_edit(request: EditRequest) -> tuple[str, str]:
    """What is made, and how."""
    strengths = ", ".join(f"{strength:.3g}" for strength in request.strengths.tolist())
    if request.edits:
        return "edits", f"{', '.join(request.edits)}; strength {strengths}"
    if request.kept is not None:
        return "reconstructions", f"from the first latent groups: {', '.join(request.kept) or 'each number of them'}"
    if request.traversed is not None:
        return "edits", f"{request.traversed} along {request.directions} principal directions; strength {strengths}"
    return "interpolation", f"linear and spherical, {request.steps} images each"


def write_edits(
    trained: TrainedModel, request: EditRequest, out: Path | None, folder: Path, animations: Sequence[str] = ()
) -> list[Path]:
    """Writes the picture to `out`, or into `folder` under a name that says what was edited; and animations with these
    suffixes beside it. Returns their paths.

    Raises ValueError for an unknown sample, attribute, class or group, or a request that this model does not support.
    """
    shards = open_split(request.data, request.split) if request.data else None
    subjects = _open_subjects(trained, shards, request)
    path = out or folder / _default_name(subjects, request)
    animated = [path.with_suffix(suffix) for suffix in animations]
    for animation in animated:
        check_animation(animation)
    drawn = _draw(trained, shards, subjects, request)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, drawn.picture())
    if animated:
        frames = _animated(trained, subjects, request.frames)
        milliseconds = [END_MILLISECONDS if i in (0, request.frames - 1) else MILLISECONDS for i in range(len(frames))]
        for animation in animated:
            save_animation(animation, frames, milliseconds)
    return [path, *animated]


def _draw(
    trained: TrainedModel, shards: TarShards | None, subjects: list[Subject], request: EditRequest
) -> LabeledImages:
    if request.edits:
        return _edited(trained, shards, subjects, request)
    if request.kept is not None:
        temperature = 0.0 if request.temperature is None else request.temperature
        return first_groups_picture(trained, subjects, request.kept, temperature, request.seed)
    if request.traversed is None:
        return _interpolated(trained, subjects, request.steps)
    group = find_group(request.traversed, trained.model.groups, "--traverse")
    temperature = 1.0 if request.temperature is None else request.temperature
    found = find_directions(trained, shards, group, request.directions, request.num_images)
    return traversal_picture(trained, subjects, group, found, request.strengths, temperature)


def _open_subjects(trained: TrainedModel, shards: TarShards | None, request: EditRequest) -> list[Subject]:
    """The images of the request, with the condition of each."""
    subjects = []
    transform = shards.manifest["transform"] if shards else None
    for path in request.files:
        image, done = open_picture(path, trained.image_shape, transform)
        condition, inferred = editing.known_condition(trained, image, request.known)
        log.info("%s: %s%s", path.name, done, f"; inferred: {inferred}" if inferred else "")
        subjects.append(Subject(path.stem, image, condition))
    for key in request.keys:
        index = editing.find_sample(shards, key)
        image = torch.from_numpy(shards.images([index]).transpose(0, 3, 1, 2).copy())
        subjects.append(Subject(shards.keys([index])[0], image, editing.sample_conditions(trained, shards, [index])))
    return subjects


def _edited(
    trained: TrainedModel, shards: TarShards | None, subjects: list[Subject], request: EditRequest
) -> LabeledImages:
    """Per image a row of the original, the reconstruction, and the edit at each strength."""
    strengths = request.strengths
    if trained.recipe.condition is None:
        if shards is None:
            raise ValueError("the model was trained without a condition; give --data DIR, a shard set with attributes")
        settings = parse_settings(",".join(request.edits))
        direction = editing.find_direction(trained, shards, settings, request.num_images)
        edits = [editing.edit_by_direction(trained, subject, direction, strengths) for subject in subjects]
    else:
        edits = [editing.edit_by_condition(trained, subject, request.edits, strengths) for subject in subjects]
    rows = [
        torch.cat([subject.image, _reconstruction(trained, subject), to_uint8(edited)])
        for subject, edited in zip(subjects, edits, strict=True)
    ]
    columns = ["original", "recon-\nstruction", *(f"{strength:.3g}" for strength in strengths.tolist())]
    return LabeledImages(torch.cat(rows), Labels(columns, caption=f"{', '.join(request.edits)}, by strength"))


def _interpolated(trained: TrainedModel, subjects: list[Subject], steps: int) -> LabeledImages:
    """Two rows, linear and spherical, between the originals."""
    start, end = subjects
    paths = editing.interpolate(trained, start, end, steps)
    rows = [torch.cat([start.image, to_uint8(path), end.image]) for path in paths]
    columns = ["original", *(f"{weight:.3g}" for weight in torch.linspace(0, 1, steps).tolist()), "original"]
    return LabeledImages(torch.cat(rows), Labels(columns, ["linear", "spherical"]))


def _animated(trained: TrainedModel, subjects: list[Subject], count: int) -> np.ndarray:
    """uint8 (n, height, width, C): spherical interpolation from the first to the second image and back, without the
    first frame at the end, since the animation repeats.
    """
    _, path = editing.interpolate(trained, *subjects, count)
    frames = enlarged(to_uint8(path), ANIMATION_SIDE).permute(0, 2, 3, 1).numpy()
    return np.concatenate([frames, frames[-2:0:-1]])


def _reconstruction(trained: TrainedModel, subject: Subject) -> Tensor:
    """uint8 (1, C, H, W)."""
    return to_uint8(trained.reconstruct(subject.image, subject.condition, seed=None))


def _default_name(subjects: list[Subject], request: EditRequest) -> str:
    """Names the images and the edit, in characters that every file system allows."""
    edit = [*request.edits] or ["interpolation"]
    if request.kept is not None:
        edit = ["first_groups", *request.kept]
    if request.traversed is not None:
        edit = [request.traversed, "directions"]
    words = [*(subject.name for subject in subjects[:2]), *edit]
    return re.sub(r"[^\w.-]+", "_", "_".join(words))[:100] + ".png"
