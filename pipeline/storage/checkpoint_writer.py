"""Checkpoints written off the training thread: a step waits for a copy in memory, not for the disk."""

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import Snapshot
from shard_data.progress import advance

logger = logging.getLogger(__name__)

RETRY_AFTER = (1.0, 4.0, 15.0, 40.0)
"""Seconds before each further attempt to write the last checkpoint of a run: a minute in all."""


@dataclass(frozen=True)
class _Job:
    """The arguments of `Checkpoints.write`; not changed after this."""

    step: int
    snapshot: Snapshot
    facts: Mapping[str, Any]
    score: float | None


class CheckpointWriter:
    """Writes checkpoints off the training thread, one at a time, in order. A context manager that ends by `finish`.

    A checkpoint that cannot be written (OSError: full disk, quota, I/O error, permissions) does not end training: it is
    logged and reported to `on_failure(step, message)`, and the next `save` is tried as usual. `on_failure` is called on
    the writing thread, without waiting for the next checkpoint, and never after `finish` has returned. Any other
    exception is an error of the program, those of `on_failure` included: the next `save` or `finish` raises it.

    The thread ends with its last job, whatever ends training: Python waits for it on its way out. A process that is
    killed leaves a hidden folder, which the next write removes. The methods are called from one thread.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        on_failure: Callable[[int, str], None],
        retry_after: Sequence[float] = RETRY_AFTER,
        on_written: Callable[[int], None] = lambda step: None,
    ):
        self._checkpoints = checkpoints
        self._on_failure = on_failure
        self._retry_after = retry_after
        self._on_written = on_written
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._buffers: Snapshot = {}
        self._job: _Job | None = None
        self._running: Future[OSError | None] | None = None
        self._fault: OSError | None = None  # why the newest job is not on the disk
        self._gave_up = False  # `finish` has raised it: the end of the context does not try for another minute

    def save(self, step: int, tensors: Snapshot, facts: Mapping[str, Any], score: float | None = None) -> float:
        """Take the state as it is now and have it written; arguments as for `Checkpoints.save`.

        Waits for the previous write, so that at most one copy of the state is in memory. Returns the milliseconds for
        which training stood still. The next training step may change the tensors at once.
        """
        start = time.perf_counter()
        self._await_write()
        self._fault = None  # what could not be written makes room for this
        self._buffers = snapshot_into(self._buffers, tensors)
        self._job = _Job(step, self._buffers, copy.deepcopy(dict(facts)), score)
        self._running = self._thread.submit(self._write, self._job)
        return 1000 * (time.perf_counter() - start)

    def finish(self) -> None:
        """Wait until the last checkpoint handed over is on the disk; where it failed, try again for a minute.

        Raises OSError, naming step and folder, where it cannot be written all the same.
        """
        self._await_write()
        for seconds in self._retry_after:
            if self._fault is None:
                return
            logger.warning("the last checkpoint of this run is tried again in %g s", seconds)
            advance()
            time.sleep(seconds)
            self._fault = self._attempt(self._job)
        if self._fault is not None:
            self._gave_up = True
            raise self._fault

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._gave_up:
            return
        try:
            self.finish()
        except OSError as error:  # is in the log; what ended training must not be hidden by it
            if kind is None:
                raise
            logger.error("%s", error.strerror)

    def _await_write(self) -> None:
        """Wait for the running write and take note of how it ended. Interrupted, it can be called again."""
        if self._running is None:
            return
        wait([self._running])
        ended, self._running = self._running, None
        self._fault = ended.result()

    def _write(self, job: _Job) -> OSError | None:
        fault = self._attempt(job)
        if fault is not None:
            self._on_failure(job.step, fault.strerror)
        return fault

    def _attempt(self, job: _Job) -> OSError | None:
        try:
            self._checkpoints.write(job.step, job.snapshot, job.facts, job.score)
        except OSError as error:
            logger.warning("%s", error.strerror)
            return error
        self._on_written(job.step)
        return None


def snapshot_into(buffers: Snapshot, tensors: Snapshot) -> Snapshot:
    """`checkpoint.snapshot` that takes the memory of an earlier one, `buffers`, where names, shapes and dtypes agree.

    Fresh memory costs a page fault per 4 KiB at every save. Copies from a GPU go to page-locked memory, all under way
    before the one wait for them.
    """
    taken = {
        stem: {name: _buffer(tensor, buffers.get(stem, {}).get(name)) for name, tensor in group.items()}
        for stem, group in tensors.items()
    }
    for stem, group in tensors.items():
        for name, tensor in group.items():
            taken[stem][name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    for device in {tensor.device for group in tensors.values() for tensor in group.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return taken


def _buffer(tensor: Tensor, earlier: Tensor | None) -> Tensor:
    """Contiguous CPU memory for a tensor."""
    if earlier is not None and (earlier.shape, earlier.dtype) == (tensor.shape, tensor.dtype):
        return earlier
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
