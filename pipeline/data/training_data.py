"""The interface of a data set for the trainer and the evaluator. `pipeline.run.data.RunData` implements it."""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.data.shards import UnreadableShard
from pipeline.data.unreadable import SkippedSample


class TrainingData(Protocol):
    """Batches of a training split and of a held-out split, on this rank."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    def batches(self, step: int) -> Iterable[Batch]:
        """This rank's micro-batches from optimizer step `step` to the end of the run."""

    def held_out_batches(self, first: int = 0, epoch: int = 0, batch_size: int | None = None) -> Iterable[Batch]:
        """This rank's share of the held-out images, in their natural order, from batch `first` on. `epoch`: of the
        random binarization. `batch_size`: images over all processes, by default those of a forward pass.
        """

    def model_inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The model's inputs on the device: images (b, C, H, W) in [0, 1], and the condition (b, K) or None."""

    def report_unreadable(
        self,
        step: int,
        skipped: Sequence[SkippedSample],
        error: UnreadableShard | None,
        split: Literal["train", "held_out"] = "train",
    ) -> int:
        """The number of skipped samples over all ranks. Every rank calls it at the same time.

        `skipped` and `error` are those of this rank. `step` is written to the list in the run folder. Raises the error
        of the lowest rank that has one, on every rank.
        """
