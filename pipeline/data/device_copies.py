"""Copies of batches to a GPU, one batch ahead of their use."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from pipeline.data.loader import Batch


class Copy(NamedTuple):
    """A batch whose images are on their way to the device."""

    batch: Batch
    arrived: torch.cuda.Event


class SideStream:
    """Copies the images of batches on a stream of their own, beside the computation."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, batch: Batch) -> Copy:
        """Enqueues the copy. Batches whose images are in pinned memory do not wait for it."""
        with torch.cuda.stream(self._stream):
            images = batch.images.to(self._device, non_blocking=True)
        return Copy(batch._replace(images=images), self._stream.record_event())

    def finish(self, copy: Copy) -> Batch:
        """The batch, whose images what is enqueued after this call may use."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copy.arrived)
        copy.batch.images.record_stream(current)  # its memory is not reused before that work is done
        return copy.batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterable[Batch]:
    """The same batches in the same order, their images on `device`; the other columns stay on the CPU.

    On a GPU the next batch is copied while the current one is in use. On a CPU it is `batches` itself.
    """
    if device.type != "cuda":
        return batches
    stream = SideStream(device)
    return one_ahead(batches, stream.start, stream.finish)


def one_ahead(items: Iterable[Any], start: Callable[[Any], Any], finish: Callable[[Any], Any]) -> Iterator[Any]:
    """`finish(start(item))` of each item, where the next item is started before the current one is handed over.

    An error of `items` is raised in its turn, after the items before it.
    """
    source, error = iter(items), None
    started: list[Any] = []
    while error is None:
        try:
            started.append(start(next(source)))
        except Exception as raised:
            error = raised
        if len(started) == 2 or (error is not None and started):
            yield finish(started.pop(0))
    if not isinstance(error, StopIteration):
        raise error
