"""Reading around damage, where `data.on_error=skip` asks for it: batches without the samples that cannot be read.

In training another sample takes the place of a damaged one, so that batches keep their size: batch norm, KL balancing
and gradient averaging see an ordinary batch. Which one depends on (seed, epoch, index) and on what can be read, not on
ranks and workers, so runs stay reproducible and the same for every number of processes. In evaluation the sample is
left out, and means are over the rest.
"""

from typing import NamedTuple

import numpy as np

from pipeline.data.random_hash import Stream, hash64
from pipeline.data.shards import TarShards, UnreadableShard

MAX_DRAWS = 100
"""Samples drawn in the place of a damaged one before the set is given up."""


class SkippedSample(NamedTuple):
    """A sample that could not be read."""

    position: int
    """In the training stream; in evaluation the index."""
    index: int
    """Number of the sample in its split."""
    problem: str
    """Names shard, sample and offset."""
    replaced_by: int | None
    """Index of the sample that took its place; None in evaluation."""


def problem(shards: TarShards, index: int) -> str | None:
    """Why this sample cannot be read; None where it can."""
    try:
        for read in (shards.images, shards.labels, shards.attributes):
            read([index])
    except UnreadableShard as error:
        return str(error)
    return None


def replace_damaged(
    shards: TarShards, seed: int, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, list[SkippedSample]]:
    """The indices (n,) with others in the place of damaged ones, and what was left out.

    Raises UnreadableShard when too many of the set are damaged to find others.
    """
    indices, skipped = indices.copy(), []
    for place, index in enumerate(indices.tolist()):
        found = problem(shards, index)
        if found is not None:
            indices[place] = _another(shards, seed, int(epochs[place]), index, found)
            skipped.append(SkippedSample(int(positions[place]), index, found, int(indices[place])))
    return indices, skipped


def drop_damaged(shards: TarShards, indices: np.ndarray) -> tuple[np.ndarray, list[SkippedSample]]:
    """The readable ones of the indices (n,), and what was left out."""
    problems = [problem(shards, index) for index in indices.tolist()]
    skipped = [
        SkippedSample(index, index, found, None)
        for index, found in zip(indices.tolist(), problems, strict=True)
        if found is not None
    ]
    return indices[[found is None for found in problems]], skipped


def _another(shards: TarShards, seed: int, epoch: int, index: int, found: str) -> int:
    draws = hash64(seed, Stream.REPLACE, epoch, index, np.arange(MAX_DRAWS)) % np.uint64(len(shards))
    for candidate in draws.tolist():
        if problem(shards, candidate) is None:
            return candidate
    raise UnreadableShard(f"{found} ({MAX_DRAWS} samples drawn in its place were damaged as well)")
