"""Which sample is at which position of the training stream.

Positions count samples from the start of training and continue over epochs, so nothing is dropped or padded at the end
of an epoch. The order is a pure function of (shard sizes, seed, window). It is the same for every number of ranks and
workers, and resuming needs one integer.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.data.lru_cache import LRUCache
from pipeline.data.random_hash import Stream, hash64


class Order:
    """Position -> (epoch, slot in the epoch) -> sample index.

    An epoch is a random order of the shards, cut into windows of `window` shards each, and then a random order of the
    samples inside each window. `window` trades mixing for memory: only the shards of a window need to be in the page
    cache at a time; a window of all shards is a uniform shuffle of the whole set. The shards of a window change from
    epoch to epoch, so a few shards already mix well, unless the set is sorted by class, which needs a large window.

    Cost on one core: each process sorts the samples of a window when it first needs it, 0.12 s per million, and keeps
    8 B per sample of the last four windows (32 while sorting). Thus 1e6 samples in one window take 0.12 s and 8 MB per
    epoch; 1e8 samples in shards of 2,000, 32 in a window, take 8 ms and 0.5 MB per window, and all of them in one
    window would take 15 s and 800 MB.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int):
        """`shard_sizes`: samples per shard. `seed`: |seed| < 2^63. `window`: how many shards are shuffled together.

        Raises ValueError for an empty set, an empty shard, or a window below 1.
        """
        if not len(shard_sizes) or min(shard_sizes) < 1:
            raise ValueError("an order needs at least one shard, and at least one sample in each shard")
        if window < 1:
            raise ValueError(
                f"window is {window}, the number of shards that are shuffled together; it must be at least 1"
            )
        self.seed = seed
        self.window = window
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._plans = LRUCache(2)
        self._windows = LRUCache(4)

    @property
    def epoch_size(self) -> int:
        """Samples in one epoch."""
        return int(self._sizes.sum())

    def at(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample index at each of the positions (n,): int64 (n,) each. Raises ValueError below position 0."""
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()}: positions count from 0")
        epochs, slots = np.divmod(positions, self.epoch_size)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._epoch_slots(epoch, slots[here])
        return epochs, indices

    def _epoch_slots(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """Sample indices (n,) at slots (n,) of one epoch."""
        shards, bounds = self._plans.get(epoch, lambda: self._plan(epoch))
        numbers = np.searchsorted(bounds, slots, side="right") - 1
        indices = np.empty_like(slots)
        for number in np.unique(numbers).tolist():
            members = shards[number * self.window : (number + 1) * self.window]
            samples = self._windows.get((epoch, number), lambda members=members: self._shuffled(epoch, members))
            here = numbers == number
            indices[here] = samples[slots[here] - bounds[number]]
        return indices

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards (S,), and the first slot of each window (ceil(S / window),)."""
        keys = hash64(self.seed, Stream.SHARDS, epoch, np.arange(len(self._sizes)))
        shards = np.argsort(keys, kind="stable")
        sizes = self._sizes[shards]
        return shards, (np.cumsum(sizes) - sizes)[:: self.window]

    def _shuffled(self, epoch: int, shards: np.ndarray) -> np.ndarray:
        """The sample indices of these shards in the epoch's order."""
        samples = np.concatenate([np.arange(self._sizes[s]) + self._starts[s] for s in shards])
        keys = hash64(self.seed, Stream.SAMPLES, epoch, samples)
        return samples[np.argsort(keys, kind="stable")]
