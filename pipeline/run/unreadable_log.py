"""Unreadable samples, reported on every rank: all ranks raise the same error, or all continue without the samples."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.shards import UnreadableShard
from pipeline.data.unreadable import SkippedSample
from pipeline.distributed.runtime import Runtime, raised_on_all_ranks
from pipeline.storage.metrics_file import cut_records
from pipeline.storage.optional_files import OptionalFiles, append_lines

FILE = "skipped_samples.jsonl"
log = logging.getLogger("pipeline")


class UnreadableLog:
    """Counts the skipped samples, and lists them in the run folder: one line per sample, when it is first skipped.

    A line: {"step", "split", "index", "position", "replaced_by", "problem"}; `problem` names shard, sample and offset.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self._path: Path | None = None
        self._listed: set[tuple[str, int]] = set()
        self._files = OptionalFiles()

    def open(self, folder: Path, last_step: int) -> None:
        """Starts or continues the list. Removes lines after `last_step`, whose steps will be repeated."""
        self._path = folder / FILE
        cut_records(self._path, last_step)
        if self._path.exists():
            lines = [json.loads(line) for line in self._path.read_text().splitlines()]
            self._listed = {(line["split"], line["index"]) for line in lines}

    def report(
        self, step: int, split: str, skipped: Sequence[SkippedSample], error: UnreadableShard | None = None
    ) -> int:
        """The number of skipped samples over all ranks. Every rank calls it at the same time.

        Raises the error of the lowest rank that has one, on every rank.
        """
        if self.runtime.all_agree(error is None and not skipped):
            return 0
        reports = self.runtime.gather_objects((list(skipped), error))
        errors = [error for _, error in reports if error is not None]
        if errors:
            raise raised_on_all_ranks(errors[0])
        found = sorted(
            (SkippedSample(*sample) for samples, _ in reports for sample in samples), key=lambda s: s.position
        )
        self._list(step, split, found)
        return len(found)

    def _list(self, step: int, split: str, found: list[SkippedSample]) -> None:
        new = {(split, sample.index): sample for sample in found if (split, sample.index) not in self._listed}
        self._listed |= new.keys()
        if not new or not self.runtime.is_main:
            return
        first = next(iter(new.values())).problem
        log.warning("step %d, %s: %d more samples are unreadable and skipped: %s", step, split, len(new), first)
        if self._path is not None:
            lines = [json.dumps({"step": step, "split": split} | sample._asdict()) for sample in new.values()]
            with self._files.writing("lines of skipped_samples.jsonl", self._path):
                append_lines(self._path, "".join(f"{line}\n" for line in lines))
