"""How far a run is: the integers that a checkpoint holds beside its tensors."""

import logging
from dataclasses import asdict, dataclass, fields

from pipeline.distributed.runtime import raised_on_all_ranks

log = logging.getLogger("pipeline")


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient. The last good checkpoint stays."""


@dataclass
class Progress:
    """Steps taken, and what was skipped."""

    step: int = 0
    """Optimizer steps taken; also the index of the next one."""
    skipped_steps: int = 0
    """Steps without effect, because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those since the last finite step."""
    skipped_samples: int = 0
    """Samples that could not be read and were replaced."""

    @classmethod
    def read(cls, facts: object, step: int) -> "Progress":
        """The progress that a checkpoint of `step` states. Raises ValueError where that cannot be: a wrong type, a
        missing or negative number, or more skipped steps than steps.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(facts, dict) or not facts.keys() >= known:
            raise ValueError(f"its progress {shortened(facts)} does not state {', '.join(sorted(known))}")
        progress = cls(**{name: facts[name] for name in known})
        counts = asdict(progress).values()
        if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise ValueError(f"its progress {shortened(facts)} is not made of counts")
        if not progress.skipped_in_a_row <= progress.skipped_steps <= progress.step == step:
            raise ValueError(f"its progress {shortened(facts)} is impossible at step {step}")
        return progress

    def count_step(self, finite: bool, max_skipped_in_a_row: int) -> None:
        """Counts a step. Raises TrainingDiverged on every rank where too many in a row were skipped."""
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


def shortened(value: object) -> str:
    """A value of a file, for an error message."""
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
