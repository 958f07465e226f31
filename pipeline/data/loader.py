"""From shards to batches: PyTorch's DataLoader over whole micro-batches.

A micro-batch is read, preprocessed and handed over as one item, and which samples it holds is decided by its number
alone. So the number of workers cannot change what the model sees, and starting at any micro-batch costs nothing.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data.order import Order
from pipeline.data.preprocess import Binarize, Preprocess
from pipeline.data.shards import TarShards, UnreadableShard
from pipeline.data.unreadable import SkippedSample, drop_damaged, replace_damaged
from pipeline.schema import Section
from shard_data.manifest import Image

OnError = Literal["raise", "skip"]


class DataConfig(Section):
    """Which images, and how they are made ready for the model."""

    root: str | None = None
    """Folder of the shard set, or the http(s):// address of such a folder; `--data DIR` sets it."""
    cache: str | None = None
    """Folder into which a set at an address is fetched, once per node. Default: the environment variable
    NVAE_CACHE_DIR, or ~/.cache/nvae-pipeline."""
    verify: bool = True
    """Compare each tar with its sha256 when a process first opens it, at 0.5 to 2 GB/s; otherwise changed pixels of
    `.npy` images are not noticed."""
    on_error: OnError = "raise"
    """What becomes of samples that cannot be read. raise: the run ends, on every process with the same message. skip:
    it goes on without them, listed in skipped_samples.jsonl; in training others take their places. Changed pixels of
    `.npy` images are not noticed then, since the hash of a tar does not tell which sample to leave out."""
    source: str | None = None
    """What makes this set when written after `python -m shard_data`; DIR stands for the originals. A set that needs
    none is made where it is missing."""
    train_split: str = "train"
    """Split that is trained on."""
    holdout: int | float = Field(default=0, ge=0)
    """Images of the training split that are held out as split `val`, for a set that has none: a number, or a fraction
    below 1. Which ones depends on train.seed and the set. They are not trained on; validate on them with
    validation.split=val. 0: none."""
    size: int = Field(default=32, ge=1, le=2**13)
    """Height and width, in pixels, that the stored images must have, before padding."""
    channels: int = Field(default=3, ge=1, le=16)
    """Colour channels that the stored images must have."""
    flip: bool = False
    """Mirror training images left and right with probability 1/2."""
    binarize: Binarize = "none"
    """dynamic: each value becomes 255 with probability grey / 255 and else 0, sampled again in every epoch; or none."""
    pad: int = Field(default=0, ge=0, le=2**10)
    """Black pixels added on each side."""
    bits: int = Field(default=8, ge=1, le=8)
    """Bits per colour channel that the model sees."""
    window: int = Field(default=32, ge=1, le=256)
    """Shards shuffled together: more mix better, fewer need less memory for the page cache (32 MiB each, about)."""
    workers: int = Field(default=2, ge=0)
    """Reading processes per training process; 0 reads in the training process. Does not change the batches."""
    trace: bool = False
    """Write the epoch and the sample keys of every global batch to data_trace.jsonl."""

    @field_validator("holdout")
    @classmethod
    def _is_number_or_fraction(cls, holdout: int | float) -> int | float:
        if isinstance(holdout, float) and holdout >= 1:
            raise ValueError(f"give a whole number of images, or a fraction below 1; not {holdout}")
        return holdout


class Batch(NamedTuple):
    """b samples of one rank, on the CPU; the images are pinned where the loader was asked to. A NamedTuple, which
    DataLoader can pin and transfer.
    """

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
    """What could not be read of this batch; its columns are without it."""


class Batches:
    """Items `numbers` of a data set of whole batches, read ahead by a DataLoader; each iteration begins anew.

    A damaged shard ends the iteration with its own error, whichever worker met it. Workers hand the error over as an
    item: DataLoader would wrap a raised one in the worker's traceback, in a reference cycle that keeps workers alive.
    """

    def __init__(self, dataset: Dataset, numbers: range, workers: int, pin_memory: bool):
        self._loader = DataLoader(
            dataset,
            batch_size=None,  # an item is a batch already
            sampler=numbers,
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            prefetch_factor=4 if workers else None,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for item in start_workers(self._loader):
            if isinstance(item, UnreadableShard):
                raise item
            yield Batch(item.images, *map(torch.from_numpy, item[1:6]), item.skipped)


def check_data(config: DataConfig, image: Image, place: str) -> None:
    """Raises ValueError, naming the setting, where the images of the shard set at `place` do not fit."""
    height, width, channels = image["height"], image["width"], image["channels"]
    if (height, width) != (config.size, config.size):
        raise ValueError(
            f"data.size is {config.size}, but {place} holds images of {height}x{width}; "
            f"use a recipe for that size, or make the shards again with --size {config.size}"
        )
    if channels != config.channels:
        raise ValueError(
            f"data.channels is {config.channels}, but {place} holds images of {channels} channels; "
            f"use a recipe for that data set, or name another set with --data"
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
) -> Batches:
    """This rank's share of the global micro-batches start, start + 1 ... stop - 1: one Batch each.

    Micro-batch m holds the positions [m * micro_batch, (m + 1) * micro_batch); rank r takes the r-th of `world_size`
    equal, contiguous shares. Raises ValueError when the shares would be unequal.
    """
    if micro_batch % world_size:
        raise ValueError(f"a global micro-batch of {micro_batch} does not divide among {world_size} processes")
    dataset = _TrainBatches(shards, preprocess, on_error, order, micro_batch, rank, world_size)
    return Batches(dataset, range(start, stop), workers, pin_memory)


def build_eval_loader(
    shards: TarShards,
    preprocess: Preprocess,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    on_error: OnError = "raise",
) -> Batches:
    """The first `limit` samples (default: all) in natural order, each on one rank; positions are indices, epochs 0.

    `batch_size` is global: a rank gets about batch_size / world_size samples at a time. Ragged tails are kept, so ranks
    may get different numbers of samples and of batches, and none at all when there are more ranks than samples: reduce
    sums and counts. With `on_error` "skip" a batch of which nothing can be read is empty.
    """
    count = len(shards) if limit is None else min(limit, len(shards))
    mine = range(count * rank // world_size, count * (rank + 1) // world_size)
    dataset = _EvalBatches(shards, preprocess, on_error, mine, max(1, batch_size // world_size))
    return Batches(dataset, range(len(dataset)), workers, pin_memory)


class _WholeBatches(Dataset):
    """Items are whole batches. What an item cannot give is handed over as an error, for `Batches` to raise.

    All columns but the images are still NumPy's: a tensor from a worker takes a file of shared memory and a handshake,
    five of which cost as much as reading 500 small images.
    """

    def __init__(self, shards: TarShards, preprocess: Preprocess, on_error: OnError):
        self.shards = shards
        self.preprocess = preprocess
        self.on_error = on_error

    def __getitem__(self, number: int) -> Batch | UnreadableShard:
        try:
            return self._item(number)
        except UnreadableShard as error:
            return UnreadableShard(str(error))  # without the traceback, which does not travel

    def _item(self, number: int) -> Batch:
        positions, epochs, indices = self._plan(number)
        try:
            return self._read(positions, epochs, indices)
        except UnreadableShard:
            if self.on_error == "raise":
                raise
            return self._read_around(positions, epochs, indices)

    def _read(self, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        images = torch.from_numpy(self.preprocess(self.shards.images(indices), epochs, indices))
        return Batch(images, positions, epochs, indices, self.shards.labels(indices), self.shards.attributes(indices))


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

    def _read_around(self, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        indices, skipped = replace_damaged(self.shards, self.order.seed, positions, epochs, indices)
        return self._read(positions, epochs, indices)._replace(skipped=skipped)


class _EvalBatches(_WholeBatches):
    """Item i: the i-th batch of the indices in `mine`."""

    def __init__(self, shards: TarShards, preprocess: Preprocess, on_error: OnError, mine: range, batch: int):
        super().__init__(shards, preprocess, on_error)
        self.mine = mine
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch)

    def _plan(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indices = np.asarray(self.mine[number * self.batch : (number + 1) * self.batch])
        return indices, np.zeros_like(indices), indices

    def _read_around(self, _positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        kept, skipped = drop_damaged(self.shards, indices)
        return self._read(kept, epochs[: len(kept)], kept)._replace(skipped=skipped)


def _as_it_is(item):
    return item


def start_workers(loader: DataLoader) -> Iterator[Any]:
    """An iterator over the loader, whose workers are born with the signals blocked that `_start_worker` is to settle:
    none of their threads can be reached by one before that.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_worker: int) -> None:
    """Ctrl-C reaches the whole process group, and SLURM's signals every process of a job: the training process decides
    what they mean. Its workers end when it tells them to, or when it has died.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_follow, args=[multiprocessing.parent_process().pid], daemon=True).start()
    torch.set_num_threads(1)


def _follow(parent: int) -> None:
    """SIGTERM counts only from a worker's own process, which at its exit sends it and waits, as long as that takes.

    PyTorch too looks whether that process lives, but not whether it died while its worker was starting.
    """
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if sent is not None and sent.si_pid == parent:
            break
    os._exit(0)
