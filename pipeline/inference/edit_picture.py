"""The picture that edit.py writes: rows of edits, or interpolations between two images."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.shards import TarShards
from pipeline.evaluation.images import image_grid, to_uint8
from pipeline.inference import editing
from pipeline.inference.editing import Subject
from pipeline.inference.folders import open_split
from pipeline.inference.parse_condition import parse_settings
from pipeline.inference.read_image import open_picture
from pipeline.inference.trained import TrainedModel
from pipeline.storage.pictures import save_png

log = logging.getLogger("pipeline")


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
    """Attributes (`Smiling=1`) or class to set; empty to interpolate between two images."""
    strengths: Tensor
    """(n,) strengths of the edit."""
    steps: int
    """Images of an interpolation."""
    num_images: int
    """Images of `data` for the mean differences."""


def write_edits(trained: TrainedModel, request: EditRequest, out: Path | None, folder: Path) -> Path:
    """Writes the picture to `out`, or into `folder` under a name that says what was edited. Returns its path.

    Every row begins with the original and its reconstruction. Raises ValueError for an unknown sample, attribute or
    class, or a request that this model does not support.
    """
    shards = open_split(request.data, request.split) if request.data else None
    subjects = _open_subjects(trained, shards, request)
    rows, columns = (
        _edited(trained, shards, subjects, request)
        if request.edits
        else _interpolated(trained, subjects, request.steps)
    )
    path = out or folder / _default_name(subjects, request.edits)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, image_grid(rows, columns))
    return path


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
        subjects.append(Subject(shards.keys([index])[0], image, editing.sample_condition(trained, shards, index)))
    return subjects


def _edited(
    trained: TrainedModel, shards: TarShards | None, subjects: list[Subject], request: EditRequest
) -> tuple[Tensor, int]:
    """Per image a row of the original, the reconstruction, and the edit at each strength; and the row's length."""
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
    return torch.cat(rows), 2 + len(strengths)


def _interpolated(trained: TrainedModel, subjects: list[Subject], steps: int) -> tuple[Tensor, int]:
    """Two rows, linear and spherical, between the originals; and the row's length."""
    start, end = subjects
    paths = editing.interpolate(trained, start, end, steps)
    rows = [torch.cat([start.image, to_uint8(path), end.image]) for path in paths]
    return torch.cat(rows), steps + 2


def _reconstruction(trained: TrainedModel, subject: Subject) -> Tensor:
    """uint8 (1, C, H, W)."""
    return to_uint8(trained.reconstruct(subject.image, subject.condition, seed=None))


def _default_name(subjects: list[Subject], edits: Sequence[str]) -> str:
    """Names the images and the edit, in characters that every file system allows."""
    words = [*(subject.name for subject in subjects[:2]), *(edits or ["interpolation"])]
    return re.sub(r"[^\w.-]+", "_", "_".join(words))[:100] + ".png"
