"""How far a run is: the integers that a checkpoint holds beside its tensors."""

import logging
from dataclasses import dataclass

from pipeline.distributed.runtime import raised_on_all_ranks

log = logging.getLogger("pipeline")


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient. The last good checkpoint stays."""


@dataclass
class Progress:
    """Steps that were taken, and what was skipped."""

    step: int = 0
    """Optimizer steps taken; also the number of the next one."""
    skipped_steps: int = 0
    """Steps without effect, because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the last ones without a finite step between them."""
    skipped_samples: int = 0
    """Samples that could not be read and were replaced."""

    def count_step(self, finite: bool, max_skipped_in_a_row: int) -> None:
        """A step was taken. Raises TrainingDiverged, on every rank, where too many in a row were skipped."""
        self.step += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite:
            return
        self.skipped_steps += 1
        log.warning(
            "step %d: non-finite loss or gradient; skipped on every rank (%d so far)", self.step - 1, self.skipped_steps
        )
        if self.skipped_in_a_row >= max_skipped_in_a_row:
            advice = (
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient. The last checkpoint is "
                "good: run the same command again with `--resume changed` and a lower optim.lr, or with optim.clip set "
                "(for instance optim.clip=200), or with train.precision=fp32. train.max_skipped_steps sets how many "
                "such steps in a row are tolerated."
            )
            raise raised_on_all_ranks(TrainingDiverged(advice))
