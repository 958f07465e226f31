"""How well faces are edited by attribute, measured with a judge: a classifier that was not used to train the model.

Each held-out face is encoded with its own attributes. Then one attribute is set on all faces that lack it, or cleared
on all that have it (its rivals change with it), and the face is decoded. The judge's predictions are compared with the
target attribute, and for the other attributes with the original.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.data.shards import TarShards
from pipeline.models.base import VAE, evaluating, without_border
from pipeline.models.classifier import Classifier, columns_of, is_known
from pipeline.models.conditions import AttributeCondition, find_name
from pipeline.models.noise import draw_noise

EDITS = {"set": 1.0, "clear": 0.0}
ON_REAL_IMAGES = ("share", "judge_accuracy", "judge_sensitivity", "judge_specificity")
COUNTED = (*ON_REAL_IMAGES, "reconstruction_accuracy", *EDITS)
LEAST_SHARE = 0.05  # of the faces that have an attribute, and that lack it
LEAST_ACCURACY = 0.85  # of the judge on real images


class Faces(NamedTuple):
    """b held-out images of one rank, on the model's device."""

    x: Tensor
    """(b, C, H, W) in [0, 1]: the model's input, border included."""
    condition: Tensor
    """(b, K) as the model takes it."""
    truth: Tensor
    """(b, A) in the order of the judge's names: 1 present, 0 absent, -1 unknown or hidden in the image."""
    positions: list[int]
    """Numbers of the images in their split; the latent noise is a function of them."""


def held_out_faces(
    batches: Iterable[Batch],
    shards: TarShards,
    inputs: Callable[[Batch], tuple[Tensor, Tensor | None]],
    judge: Classifier,
) -> Iterator[Faces]:
    """What `edit_figures` takes, from a loader's batches of `shards`; `inputs` gives the model's input and condition.

    Raises ValueError for a judge with attributes that the set does not have.
    """
    columns = judged_columns(shards, judge)
    for batch in batches:
        if len(batch.images):
            x, condition = inputs(batch)
            hidden = torch.from_numpy(shards.hidden(batch.indices.numpy()))
            truth = batch.attributes.masked_fill(hidden, -1)[:, columns]
            yield Faces(x, condition, truth.to(x.device), batch.positions.tolist())


def judged_columns(shards: TarShards, judge: Classifier) -> list[int]:
    """The set's columns of the judge's attributes. Raises ValueError for a set without one of them."""
    known = shards.attribute_names
    return [known.index(find_name(name, known, "the classifier's attribute")) for name in judge.names]


def hidden_by(shards: TarShards, judge: Classifier) -> Tensor:
    """(2, A, A) bool, in the order of the judge's names: [v, a, b] is true if b is hidden in all images whose a is v.

    Computed from the split. Example: with a hat, bangs are hidden in every picture.
    """
    indices, columns = np.arange(len(shards)), judged_columns(shards, judge)
    attributes = shards.attributes(indices)[:, columns]  # (N, A)
    hidden = shards.hidden(indices)[:, columns].astype(np.int64)
    tables = []
    for value in (0, 1):
        having = (attributes == value).astype(np.int64)
        count = having.sum(0)[:, None]
        tables.append((having.T @ hidden == count) & (count > 0))
    return torch.from_numpy(np.stack(tables))


@torch.no_grad()
def edit_figures(
    model: VAE,
    condition: AttributeCondition,
    batches: Iterable[Faces],
    judge: Classifier,
    seed: int,
    hides: Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """Shares in [0, 1], exact on any number of processes; NaN if there was nothing to count.

    For EDIT `set` (on faces that lack the attribute) and `clear` (on those that have it):
    `edit/EDIT/NAME` edits in which the judge sees the target, `edit/EDIT` their mean over the attributes,
    `edit/EDIT_minimum` the least of them; `edit/EDIT_others` other attributes that are as in the original, over all
    such edits. The same with `_reliable` at the end: edited and other attributes are those of the model alone that at
    least 5 % of the faces have, at least 5 % lack, and the judge gets right on at least 85 % of the real images. For
    reference, over all of the judge's attributes and of each that is edited (`/NAME`): `edit/judge_accuracy` of the
    judge on the real images, `edit/reconstruction_accuracy` of the judge on their reconstructions; of each that is
    edited, `edit/share/NAME` of faces that have it, `edit/judge_sensitivity/NAME` of these in which the judge sees it,
    and `edit/judge_specificity/NAME` of the others in which it does not.

    Not counted are attributes that are unknown or hidden in the original or, according to `hides` (see `hidden_by`),
    in the edit; and, among the others, the rivals of the edited attribute.

    `batches`: this rank's share (see `held_out_faces`). Latents are posterior samples, a function of (seed, image).
    `autocast` is for the model; the judge computes in the precision of the weights. The model keeps its mode. Raises
    ValueError for a judge of other images, or without the model's attributes.
    """
    figures = Edits(model, condition, judge, seed, hides, autocast)
    with evaluating(model):
        for faces in batches:
            figures.add(faces)
    return figures.reduce(sum_over_ranks)


class Edits:
    """Counts of the judge's predictions, batch by batch."""

    def __init__(
        self,
        model: VAE,
        condition: AttributeCondition,
        judge: Classifier,
        seed: int,
        hides: Tensor,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.model = model
        self.autocast = autocast
        self.condition = condition
        self.seed = seed
        reference = next(model.parameters())
        self.judge = judge.to(reference.device, reference.dtype)
        self.border = border_around(model.image_shape, judge.image_shape)
        self.columns = columns_of(judge, condition.chosen)  # of the model's attributes, among the judge's
        self.hides = hides.to(reference.device)
        shape = (len(COUNTED), 2, len(judge.names))  # [1]: how many were as expected, of how many
        self.counts = torch.zeros(shape, dtype=torch.float64, device=reference.device)
        by_other = (len(EDITS), *shape[1:], len(judge.names))  # the same of other attributes, by the edited one
        self.others = torch.zeros(by_other, dtype=torch.float64, device=reference.device)

    def add(self, faces: Faces) -> None:
        noise = draw_noise(self.model.groups, self.seed, "edit", faces.positions, faces.x.device, faces.x.dtype)
        with self.autocast():
            latents = self.model.encode(faces.x, noise, faces.condition)
        known = is_known(faces.truth)
        right = self._predict(faces.x) == faces.truth
        self._count("share", faces.truth == 1, known)
        self._count("judge_accuracy", right, known)
        self._count("judge_sensitivity", right, faces.truth == 1)
        self._count("judge_specificity", right, faces.truth == 0)
        self._count("reconstruction_accuracy", self._predict_decoded(latents, faces.condition) == faces.truth, known)
        for edit, value in EDITS.items():
            for name, column in zip(self.condition.chosen, self.columns, strict=True):
                rows = (faces.truth[:, column] == 1 - value).nonzero()[:, 0]
                if len(rows):
                    changed = self.condition.changed(faces.condition[rows], {name: value})
                    predicted = self._predict_decoded([latent[rows] for latent in latents], changed)
                    self._add_edit(edit, name, column, predicted, faces.truth[rows])

    def _add_edit(self, edit: str, name: str, column: int, predicted: Tensor, truth: Tensor) -> None:
        """`predicted`, `truth` (b, A): the judge's predictions for edits, and the originals' attributes."""
        target = torch.zeros_like(self.hides[0, 0])
        target[column] = True
        self._count(edit, predicted == EDITS[edit], target.expand_as(predicted))
        others = is_known(truth) & ~self.hides[int(EDITS[edit]), column]
        others[:, [column, *(self.columns[rival] for rival in self.condition.rivals(name))]] = False
        self.others[list(EDITS).index(edit), :, column] += _right_and_all(predicted == truth, others)

    def _count(self, name: str, as_expected: Tensor, counted: Tensor) -> None:
        """Both (b, A) bool."""
        self.counts[COUNTED.index(name)] += _right_and_all(as_expected, counted)

    def _predict(self, images: Tensor) -> Tensor:
        """(b, A) bool: the judge's predictions for images with the model's border."""
        return self.judge.present(without_border(images, self.border))

    def _predict_decoded(self, latents: Sequence[Tensor], condition: Tensor) -> Tensor:
        """The same for images decoded from latents."""
        with self.autocast():
            images = self.model.decode(latents, condition)
        return self._predict(images.to(condition.dtype))

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The figures over all ranks."""
        counts = dict(zip(COUNTED, sum_over_ranks(self.counts).cpu(), strict=True))
        others = dict(zip(EDITS, sum_over_ranks(self.others).cpu(), strict=True))
        by_attribute = {name: right / count for name, (right, count) in counts.items()}  # (A,), NaN where count is 0
        figures = {
            f"{name}/{attribute}": by_attribute[name][column].item()
            for name in (*ON_REAL_IMAGES, "reconstruction_accuracy", *EDITS)
            for attribute, column in zip(self.condition.chosen, self.columns, strict=True)
        }
        every = torch.ones(len(self.judge.names), dtype=torch.bool)
        reliable = is_reliable(by_attribute["share"], by_attribute["judge_accuracy"])
        reliable &= torch.zeros_like(every).index_fill(0, torch.tensor(self.columns), True)
        for name in ("judge_accuracy", "reconstruction_accuracy"):
            figures[name] = _share(counts[name], every)
        for edit in EDITS:
            for ending, kept in {"": every, "_reliable": reliable}.items():
                rates = by_attribute[edit][kept & (counts[edit][1] > 0)]
                figures[f"{edit}{ending}"] = rates.mean().item()
                figures[f"{edit}_minimum{ending}"] = rates.min().item() if len(rates) else math.nan
                figures[f"{edit}_others{ending}"] = _share(others[edit][:, kept].sum(1), kept)
        return {f"edit/{name}": figure for name, figure in sorted(figures.items())}


def is_reliable(share: Tensor, judge_accuracy: Tensor) -> Tensor:
    """(A,) bool: attributes that are neither too rare nor too hard for the judge, so that its answers count.

    `share` of the faces that have it, and the judge's accuracy on real images: both (A,) in [0, 1].
    """
    return (share >= LEAST_SHARE) & (share <= 1 - LEAST_SHARE) & (judge_accuracy >= LEAST_ACCURACY)


def _right_and_all(as_expected: Tensor, counted: Tensor) -> Tensor:
    """(2, A): how many are as expected, of how many that count. Both (b, A) bool."""
    return torch.stack([(as_expected & counted).sum(0), counted.sum(0)])


def _share(counts: Tensor, kept: Tensor) -> float:
    """Over the attributes kept (A,), of counts (2, A)."""
    right, count = counts[:, kept].sum(1).tolist()
    return right / count if count else math.nan


def border_around(model_shape: tuple[int, int, int], judge_shape: tuple[int, int, int]) -> int:
    """Pixels on each side that the model's images (C, H, W) have beyond the judge's. Raises ValueError if they differ
    otherwise.
    """
    border = (model_shape[1] - judge_shape[1]) // 2
    channels, height, width = judge_shape
    if border < 0 or tuple(model_shape) != (channels, height + 2 * border, width + 2 * border):
        shapes = " and ".join("x".join(map(str, shape)) for shape in (judge_shape, model_shape))
        raise ValueError(f"the classifier and the model take different images: {shapes} (channels, height, width)")
    return border
