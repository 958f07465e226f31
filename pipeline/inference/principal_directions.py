"""Principal directions of one latent group over the images of a data set.

Of every image, the group's noise is e = (z - mu) / sigma, with z the posterior's mean, and mu and sigma of the group's
prior given the posterior means of the groups before it: what the image adds to what these groups already determine, in
units of the prior. Half its square is the share of the means in the group's KL. The directions are the principal
components of e over the images.
"""

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.shards import TarShards
from pipeline.inference.editing import sample_conditions
from pipeline.inference.passes import IMAGES_PER_PASS
from pipeline.inference.trained import TrainedModel
from shard_data.terminal import Progress, with_progress

log = logging.getLogger("pipeline")

ELEMENTS = 4096
"""Of each row that are converted to float64 at a time."""


class PrincipalDirections(NamedTuple):
    """The first D principal directions, by decreasing variance."""

    directions: Tensor
    """(D, *group.shape) float64, of length 1. The entry of largest magnitude is positive."""
    deviations: Tensor
    """(D,) standard deviations of the images along them."""
    shares: Tensor
    """(D,) of the total variance, in [0, 1]."""


def group_noise(trained: TrainedModel, shards: TarShards, group: int, count: int) -> Tensor:
    """(n, *group.shape) on the CPU: e of the first `count` images of a split."""
    rows, count = [], min(count, len(shards))
    starts = range(0, count, IMAGES_PER_PASS)
    for start in with_progress(starts, Progress("latents of the data", len(starts), "batches", write=log.info)):
        here = range(start, min(start + IMAGES_PER_PASS, count))
        condition = sample_conditions(trained, shards, here)
        images = torch.from_numpy(shards.images(here).transpose(0, 3, 1, 2).copy())
        latents = trained.encode(images, condition, seed=None)
        rows.append(trained.to_noise(latents, condition)[group].cpu())
    return torch.cat(rows)


def principal_directions(rows: Tensor, count: int) -> PrincipalDirections:
    """The first `count` principal components of rows (n, ...).

    Raises ValueError if there are not so many: at most n - 1, and as many as a row has elements. Products are summed in
    float64. Beside a copy of the rows, memory is needed for a square matrix of the smaller of n and a row's elements.
    """
    centered = rows.flatten(1)
    centered = centered - centered.double().mean(0).to(rows.dtype)  # (n, d)
    most = min(len(rows) - 1, centered.shape[1])
    if count > most:
        raise ValueError(f"--directions {count}: {len(rows)} images have at most {most}; read more with --images")
    values, vectors, total = _eigenvectors(centered, count)
    if not total > 0:
        raise ValueError("the group's posterior is its prior for all images; it has no directions")
    directions = F.normalize(vectors, dim=1)
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    directions = (signs * directions).view(count, *rows.shape[1:])
    return PrincipalDirections(directions, (values / (len(rows) - 1)).sqrt(), values / total)


def _eigenvectors(centered: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of X^T X, for X (n, d): the `count` largest eigenvalues, their vectors (count, d) of any length, and the trace.

    Where rows are few, from those of X X^T: if X X^T v = s v, then X^T v is an eigenvector of X^T X for s.
    """
    parts = centered.split(ELEMENTS, dim=1)
    few_rows = len(centered) <= centered.shape[1]
    if few_rows:
        products = sum(part.double() @ part.double().T for part in parts)
    else:
        products = centered.double().T @ centered.double()
    values, vectors = torch.linalg.eigh(products)  # ascending
    values, vectors = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count].T  # (count, n or d)
    if few_rows:
        vectors = torch.cat([vectors @ part.double() for part in parts], dim=1)
    return values, vectors, products.trace()
