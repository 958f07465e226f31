"""data_trace.jsonl: the samples that each step trained on, as they were read."""

import json
from pathlib import Path

import torch

from pipeline.data.loader import Batch
from pipeline.data.shards import TarShards
from pipeline.distributed.runtime import Runtime
from pipeline.storage.metrics_file import cut_records
from pipeline.storage.optional_files import OptionalFiles, append_lines


class Trace:
    """One line per optimizer step: {"step": s, "epochs": [...], "keys": [...]} of the global batch, in its order."""

    def __init__(self, folder: Path, start: int, shards: TarShards, runtime: Runtime, files: OptionalFiles):
        """Removes lines of steps from `start` on, which are about to be repeated."""
        self.path = folder / "data_trace.jsonl"
        self.files = files
        self.shards = shards
        self.runtime = runtime
        if runtime.is_main:
            cut_records(self.path, last_step=start - 1)

    def add(self, step: int, micro_batches: list[Batch]) -> None:
        """Gathers the step's samples from all ranks; the main process writes them."""
        seen = [torch.stack([b.positions, b.epochs, b.indices], dim=1).to(self.runtime.device) for b in micro_batches]
        rows = torch.cat([self.runtime.gather(part) for part in seen]).tolist()  # (batch_size, 3)
        if self.runtime.is_main:
            keys = self.shards.keys([index for _, _, index in rows])
            line = {"step": step, "positions": [r[0] for r in rows], "epochs": [r[1] for r in rows], "keys": keys}
            with self.files.writing("lines of data_trace.jsonl", self.path):
                append_lines(self.path, json.dumps(line) + "\n")
