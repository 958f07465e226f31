"""The batches of a measured split, and what could not be read of them."""

from collections.abc import Iterator

from pipeline.data.loader import Batch
from pipeline.data.shards import UnreadableShard
from pipeline.data.unreadable import SkippedSample
from pipeline.run.data import RunData


class HeldOutBatches:
    """This rank's held-out batches, up to a shard that cannot be read. Iterate once, then call `report`."""

    def __init__(self, data: RunData):
        self._data = data
        self._skipped: list[SkippedSample] = []
        self._error: UnreadableShard | None = None

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self._data.held_out_batches():
                self._skipped += batch.skipped
                yield batch
        except UnreadableShard as error:
            self._error = error

    def report(self, step: int) -> int:
        """How many images could not be read, over all ranks. All call it: see `RunData.report_unreadable`."""
        return self._data.report_unreadable(step, self._skipped, self._error, split="held_out")
