"""From shards to batches.

A micro-batch is read, preprocessed and handed over as one item, and which samples it holds is decided by its number
alone. So the number of workers cannot change what the model sees, and starting at any micro-batch costs nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipeline.data.order import Order
from pipeline.data.preprocess import Binarize, Preprocess
from pipeline.data.shards import TarShards, UnreadableShard
from pipeline.data.unreadable import SkippedSample, drop_unreadable, replace_unreadable
from pipeline.data.workers import iterate, iterate_in_workers
from pipeline.schema import Section
from shard_data.manifest import Image, Manifest

OnError = Literal["raise", "skip"]


class DataConfig(Section):
    """Which images, and how they are preprocessed for the model."""

    root: str | None = None
    """Folder of the shard set, or the http(s):// address of such a folder; `--data DIR` sets it."""
    cache: str | None = None
    """Folder into which a set at an address is fetched, once per node. Default: the environment variable
    NVAE_CACHE_DIR, or ~/.cache/nvae-pipeline."""
    verify: bool = True
    """Compare each tar with its sha256 when a process first opens it, at 0.5 to 2 GB/s. Without it, changed pixels of
    `.npy` images are not noticed."""
    on_error: OnError = "raise"
    """What happens when a sample is unreadable. raise: the run ends with an error. skip: it continues without the
    sample, which is listed in skipped_samples.jsonl; in training another sample takes its place. Changed pixels of
    `.npy` images are not noticed then, since the hash of a tar does not say which sample changed. Faults of the system,
    such as an I/O error or too many open files, are retried for 7 s and then end the run in both cases."""
    source: str | None = None
    """The arguments of `python -m shard_data` that make this set; DIR stands for the folder of the originals. A set
    that needs no originals is made where it is missing."""
    train_split: str = "train"
    """The split to train on."""
    holdout: int | float = Field(default=0, ge=0)
    """Images of the training split that are held out as split `val`, for a set that has none: a number, or a fraction
    below 1. Which ones depends on train.seed and the set. They are not trained on; validate on them with
    validation.split=val. 0: none."""
    size: int = Field(default=32, ge=1, le=2**13)
    """Height and width, in pixels, that the stored images must have, before padding."""
    channels: int = Field(default=3, ge=1, le=16)
    """Color channels that the stored images must have."""
    flip: bool = False
    """Mirror training images left and right with probability 1/2."""
    binarize: Binarize = "none"
    """dynamic: each value v becomes 255 with probability v / 255, otherwise 0, sampled again in every epoch. fixed: the
    set is binarized already, as `python -m shard_data binarized_mnist` makes it. none: values as they are stored."""
    pad: int = Field(default=0, ge=0, le=2**10)
    """Black pixels added on each side."""
    bits: int = Field(default=8, ge=1, le=8)
    """Bits per color channel that the model sees."""
    window: int = Field(default=32, ge=1, le=256)
    """Number of shards that are shuffled together. More shards mix better; fewer need less memory for the page cache
    (about 32 MiB each)."""
    workers: int = Field(default=2, ge=0)
    """Processes that read data, per training process; 0 reads in the training process. Does not change the batches."""
    trace: bool = False
    """Write the epoch and the sample keys of every global batch to data_trace.jsonl."""

    @field_validator("holdout")
    @classmethod
    def _is_number_or_fraction(cls, holdout: int | float) -> int | float:
        if isinstance(holdout, float) and holdout >= 1:
            raise ValueError(f"give a whole number of images, or a fraction below 1; not {holdout}")
        return holdout


class Batch(NamedTuple):
    """b samples of one rank, on the CPU; the images are in pinned memory where `pin_memory` was set."""

    images: Tensor
    """(b, C, H, W) uint8, padded."""
    positions: Tensor
    """(b,) int64 position in the training stream; in evaluation the index."""
    epochs: Tensor
    """(b,) int64."""
    indices: Tensor
    """(b,) int64 number of the sample in its split."""
    labels: Tensor
    """(b,) int64; -1 where there is none."""
    attributes: Tensor
    """(b, A) int8: 1 present, 0 absent, -1 unknown; A = 0 in a set without attributes."""
    skipped: Sequence[SkippedSample] = ()
    """The samples that could not be read. In evaluation the columns are without them."""


class Batches:
    """Items `numbers` of a source of whole batches; each iteration starts from the first one."""

    def __init__(
        self,
        source: "_WholeBatches",
        numbers: range,
        workers: int = 0,
        pin_memory: bool = False,
        timeout: float | None = None,
    ):
        """`timeout`: see `workers.iterate` and `workers.iterate_in_workers`."""
        self._source = source
        self._numbers = numbers
        self._workers = workers
        self._pin_memory = pin_memory
        self._timeout = timeout

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        source, numbers, timeout = self._source, self._numbers, self._timeout
        if self._workers:
            items = iterate_in_workers(source, numbers, self._workers, timeout)
        else:
            items = iterate(source, numbers, timeout)
        for arrays, skipped in items:
            images, *columns = map(torch.from_numpy, arrays)
            yield Batch(images.pin_memory() if self._pin_memory else images, *columns, skipped)


def check_data(config: DataConfig, image: Image, place: str) -> None:
    """Raises ValueError, naming the setting, where the images of the shard set at `place` do not fit."""
    height, width, channels = image["height"], image["width"], image["channels"]
    if (height, width) != (config.size, config.size):
        other = f"train with data.size={height}" if height == width else "make it with square images"
        raise ValueError(
            f"data.size is {config.size}, but {place} holds images of {height}x{width}; "
            f"name a set of {config.size}x{config.size} images with --data, or {other}"
        )
    if channels != config.channels:
        raise ValueError(
            f"data.channels is {config.channels}, but {place} holds images of {channels} channels; "
            f"use a recipe for that data set, or another set with --data"
        )


def is_binarized(manifest: Manifest) -> bool:
    """Whether the images of a shard set were binarized when it was made."""
    return "binarization" in manifest["transform"]


def check_binarization(config: DataConfig, manifest: Manifest, place: str) -> None:
    """Raises ValueError where `data.binarize` is not what the shard set at `place` needs."""
    if config.binarize == "fixed" and not is_binarized(manifest):
        raise ValueError(
            f"data.binarize is fixed, but {place} is not a binarized set; make one with "
            "`python -m shard_data binarized_mnist`, or set data.binarize=dynamic"
        )
    if config.binarize == "dynamic" and is_binarized(manifest):
        raise ValueError(
            f"data.binarize is dynamic, but {place} is binarized already, so that nothing would be random; set "
            "data.binarize=fixed, or name a set of gray values with --data"
        )


def build_train_loader(
    shards: TarShards,
    preprocess: Preprocess,
    order: Order,
    *,
    micro_batch: int,
    start: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    on_error: OnError = "raise",
    timeout: float | None = None,
) -> Batches:
    """This rank's share of the global micro-batches start, start + 1 ... stop - 1: one Batch each.

    Micro-batch m holds the positions [m * micro_batch, (m + 1) * micro_batch); rank r takes the r-th of `world_size`
    equal, contiguous shares. `timeout`: seconds without a byte read after which the loader counts as stuck and ends the
    run. Raises ValueError when the shares would be unequal.
    """
    if micro_batch % world_size:
        raise ValueError(f"a global micro-batch of {micro_batch} does not divide among {world_size} processes")
    source = _TrainBatches(shards, preprocess, on_error, order, micro_batch, rank, world_size)
    return Batches(source, range(start, stop), workers, pin_memory, _own_timeout(timeout, workers, world_size))


def build_eval_loader(
    shards: TarShards,
    preprocess: Preprocess,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    first: int = 0,
    epoch: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    on_error: OnError = "raise",
    timeout: float | None = None,
) -> Batches:
    """The first `limit` samples (default: all) in natural order, each on one rank, from this rank's batch `first` on;
    positions are indices, and the epoch of all is `epoch`.

    `batch_size` is global: a rank gets about batch_size / world_size samples at a time. Ragged tails are kept, so ranks
    may get different numbers of samples and batches, and none when there are more ranks than samples: reduce sums and
    counts. With `on_error` "skip", a batch without a readable sample is empty.
    """
    count = len(shards) if limit is None else min(limit, len(shards))
    mine = range(count * rank // world_size, count * (rank + 1) // world_size)
    source = _EvalBatches(shards, preprocess, on_error, mine, max(1, batch_size // world_size), epoch)
    return Batches(source, range(first, len(source)), workers, pin_memory, _own_timeout(timeout, workers, world_size))


def _own_timeout(timeout: float | None, workers: int, world_size: int) -> float | None:
    """Where several ranks read without workers, the watchdog ends a rank that hangs, and reports its position."""
    return timeout if workers or world_size == 1 else None


class _Item(NamedTuple):
    """A batch in NumPy's arrays, as it comes from a worker."""

    arrays: tuple[np.ndarray, ...]
    """Images, positions, epochs, indices, labels, attributes."""
    skipped: Sequence[SkippedSample] = ()


class _WholeBatches:
    """Whole batches by their number: a `workers.Source`."""

    def __init__(self, shards: TarShards, preprocess: Preprocess, on_error: OnError):
        self.shards = shards
        self.preprocess = preprocess
        self.on_error = on_error

    def __getitem__(self, number: int) -> _Item:
        positions, epochs, indices = self._plan(number)
        try:
            return self._read(positions, epochs, indices)
        except UnreadableShard:
            if self.on_error == "raise":
                raise
            return self._read_around(positions, epochs, indices)

    def _read(
        self, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray, skipped: Sequence[SkippedSample] = ()
    ) -> _Item:
        images = self.preprocess(self.shards.images(indices), epochs, indices)
        labels, attributes = self.shards.labels(indices), self.shards.attributes(indices)
        return _Item((images, positions, epochs, indices, labels, attributes), skipped)


class _TrainBatches(_WholeBatches):
    """Item m: this rank's share of global micro-batch m."""

    def __init__(
        self,
        shards: TarShards,
        preprocess: Preprocess,
        on_error: OnError,
        order: Order,
        micro_batch: int,
        rank: int,
        world_size: int,
    ):
        super().__init__(shards, preprocess, on_error)
        self.order = order
        self.micro_batch = micro_batch
        self.share = range(micro_batch * rank // world_size, micro_batch * (rank + 1) // world_size)

    def _plan(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        positions = np.asarray(self.share) + number * self.micro_batch
        return positions, *self.order.at(positions)

    def _read_around(self, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> _Item:
        indices, skipped = replace_unreadable(self.shards, self.order.seed, positions, epochs, indices)
        return self._read(positions, epochs, indices, skipped)


class _EvalBatches(_WholeBatches):
    """Item i: the i-th batch of the indices in `mine`."""

    def __init__(
        self, shards: TarShards, preprocess: Preprocess, on_error: OnError, mine: range, batch: int, epoch: int
    ):
        super().__init__(shards, preprocess, on_error)
        self.mine = mine
        self.batch = batch
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch)

    def _plan(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indices = np.asarray(self.mine[number * self.batch : (number + 1) * self.batch])
        return indices, np.full_like(indices, self.epoch), indices

    def _read_around(self, _positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> _Item:
        kept, skipped = drop_unreadable(self.shards, indices)
        return self._read(kept, epochs[: len(kept)], kept, skipped)
