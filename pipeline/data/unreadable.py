"""Batches without unreadable samples, for `data.on_error=skip`.

In training, another sample replaces an unreadable one: batches keep their size, and batch norm, KL balancing and
gradient averaging see an ordinary batch. Which one depends on (seed, epoch, index) and on what can be read, not on
ranks and workers. So runs stay reproducible, and equal for every number of processes. In evaluation the sample is
skipped, and means are over the rest.
"""

from typing import NamedTuple

import numpy as np

from pipeline.data.random_hash import Stream, hash64
from pipeline.data.shards import TarShards, UnreadableShard

MAX_CANDIDATES = 100
"""Samples tried in the place of an unreadable one before the run ends."""


class SkippedSample(NamedTuple):
    """A sample that could not be read."""

    position: int
    """In the training stream; in evaluation, the index."""
    index: int
    """Number of the sample in its split."""
    problem: str
    """The reason, with shard, sample and offset."""
    replaced_by: int | None
    """Index of the sample that replaces it; None in evaluation."""


def problem(shards: TarShards, index: int) -> str | None:
    """Why this sample is unreadable; None where it is readable."""
    try:
        for read in (shards.images, shards.labels, shards.attributes):
            read([index])
    except UnreadableShard as error:
        return str(error)
    return None


def replace_unreadable(
    shards: TarShards, seed: int, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, list[SkippedSample]]:
    """The indices (n,) with others in the place of unreadable ones, and the skipped samples.

    Raises UnreadableShard when no readable sample is found.
    """
    indices, skipped = indices.copy(), []
    for place, index in enumerate(indices.tolist()):
        found = problem(shards, index)
        if found is not None:
            indices[place] = _replacement(shards, seed, int(epochs[place]), index, found)
            skipped.append(SkippedSample(int(positions[place]), index, found, int(indices[place])))
    return indices, skipped


def drop_unreadable(shards: TarShards, indices: np.ndarray) -> tuple[np.ndarray, list[SkippedSample]]:
    """The readable ones of the indices (n,), and the skipped samples."""
    problems = [problem(shards, index) for index in indices.tolist()]
    skipped = [
        SkippedSample(index, index, found, None)
        for index, found in zip(indices.tolist(), problems, strict=True)
        if found is not None
    ]
    return indices[[found is None for found in problems]], skipped


def _replacement(shards: TarShards, seed: int, epoch: int, index: int, found: str) -> int:
    candidates = hash64(seed, Stream.REPLACE, epoch, index, np.arange(MAX_CANDIDATES)) % np.uint64(len(shards))
    for candidate in candidates.tolist():
        if problem(shards, candidate) is None:
            return candidate
    raise UnreadableShard(f"{found} ({MAX_CANDIDATES} samples tried in its place are unreadable as well)")
