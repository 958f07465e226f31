"""How far a run is: the integers that a checkpoint holds beside its tensors."""

import logging
import math
from dataclasses import asdict, dataclass, fields

from pipeline.distributed.runtime import raised_on_all_ranks

log = logging.getLogger("pipeline")


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were skipped. The last good checkpoint stays."""


@dataclass(frozen=True)
class SkipReason:
    """Why a step was skipped: its loss or gradient was not finite, or its gradient's norm reached the threshold."""

    norm: float = math.nan
    threshold: float = 0.0
    """`optim.skip_threshold`; 0 where loss or gradient was not finite."""

    @property
    def by_norm(self) -> bool:
        return self.threshold > 0

    def __str__(self) -> str:
        if self.by_norm:
            return f"gradient norm {self.norm:.4g}, not below optim.skip_threshold={self.threshold:g}"
        return "non-finite loss or gradient"

    @property
    def advice(self) -> str:
        """What to change, where every step is skipped."""
        again = "run the same command again with `--resume changed` and"
        if self.by_norm:
            return (
                f"No weight changes as long as the norm stays there: {again} a higher threshold (for instance "
                f"optim.skip_threshold={2 * self.norm:.2g}, twice the norm), or with optim.skip_threshold=0 and "
                "optim.clip alone, or a lower optim.lr. optim.gradient_unit is the unit of both."
            )
        return (
            f"The last checkpoint is good: {again} a lower optim.lr, or with optim.clip set (for instance "
            "optim.clip=200), or with train.precision=fp32."
        )


@dataclass
class Progress:
    """Steps taken, and what was skipped."""

    step: int = 0
    """Optimizer steps taken; also the index of the next one."""
    skipped_steps: int = 0
    """Steps without effect, because loss or gradient was not finite or the gradient's norm too large."""
    skipped_in_a_row: int = 0
    """Those since the last step that had an effect."""
    skipped_samples: int = 0
    """Samples that could not be read and were replaced."""
    skipped_by_norm: int = 0
    """Of `skipped_steps`, those with a finite gradient. Checkpoints that lack it had no such steps."""

    @classmethod
    def read(cls, facts: object, step: int) -> "Progress":
        """The progress that a checkpoint of `step` states. Raises ValueError where that cannot be: a wrong type, a
        missing or negative number, or more skipped steps than steps.
        """
        known = {field.name for field in fields(cls)}
        required = known - {"skipped_by_norm"}
        if not isinstance(facts, dict) or not facts.keys() >= required:
            raise ValueError(f"its progress {shortened(facts)} does not state {', '.join(sorted(required))}")
        progress = cls(**{name: facts[name] for name in known & facts.keys()})
        counts = asdict(progress).values()
        if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise ValueError(f"its progress {shortened(facts)} is not made of counts")
        largest = max(progress.skipped_in_a_row, progress.skipped_by_norm)
        if not largest <= progress.skipped_steps <= progress.step == step:
            raise ValueError(f"its progress {shortened(facts)} is impossible at step {step}")
        return progress

    def count_step(self, skipped: SkipReason | None, max_skipped_in_a_row: int) -> None:
        """Counts a step, which had an effect or was skipped. Raises TrainingDiverged on every rank where too many in a
        row were skipped.
        """
        self.step += 1
        if skipped is None:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.skipped_steps += 1
        self.skipped_by_norm += skipped.by_norm
        counts = f"{self.skipped_in_a_row} in a row, {self.skipped_steps} so far"
        log.warning("step %d: %s; skipped on every rank (%s)", self.step - 1, skipped, counts)
        if self.skipped_in_a_row >= max_skipped_in_a_row:
            raise raised_on_all_ranks(
                TrainingDiverged(
                    f"{self.skipped_in_a_row} steps in a row were skipped; the last: {skipped}. {skipped.advice} "
                    "train.max_skipped_steps sets how many skipped steps in a row are tolerated."
                )
            )

    def scalars(self, by_norm: bool) -> dict[str, float]:
        """The counts of what was skipped, by their names in metrics.jsonl. `by_norm`: with those by the norm."""
        names = ("skipped_steps", "skipped_samples", *(("skipped_by_norm",) if by_norm else ()))
        return {f"train/{name}": float(getattr(self, name)) for name in names}


def shortened(value: object) -> str:
    """A value of a file, for an error message."""
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
