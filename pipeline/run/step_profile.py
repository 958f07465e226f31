"""`train.profile`: a trace of some training steps of every rank, and the most expensive operators."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.loader import Batch
from pipeline.distributed.runtime import Runtime
from pipeline.storage.optional_files import OptionalFiles
from pipeline.tracking.meters import Throughput
from shard_data.progress import advance

log = logging.getLogger("pipeline")

SKIPPED_STEPS = 10
"""Steps of an attempt before the recorded ones: first calls allocate memory, compile, and choose algorithms."""

NUM_ROWS = 20


class Operator(NamedTuple):
    """Means over the recorded steps."""

    name: str
    calls: float
    """Per step."""
    device_ms: float
    """Milliseconds per step of the kernels that it launched itself; 0 on a CPU."""
    cpu_ms: float
    """Milliseconds per step on the CPU, without the operators that it called."""


class Summary(NamedTuple):
    """Recorded steps of one rank."""

    step_ms: float
    """Duration of a step while it is recorded, which takes longer than without."""
    kernels: float
    """Kernels that a step runs on the device, without copies and fills of memory."""
    busy: float
    """Share [0, 1] of the time in which the device runs anything; 0 on a CPU."""
    operators: Sequence[Operator]
    """The most expensive first, by time on the device, or on a CPU by time there."""

    def describe(self) -> str:
        """The figures in words."""
        on_device = f" and {self.kernels:.0f} kernels per step, GPU busy for {self.busy:.0%} of the time"
        return f"{self.step_ms:.1f} ms{on_device if self.busy else ' per step'}"

    def table(self) -> str:
        """The most expensive operators, one a line."""
        on_device = self.busy > 0
        total = sum(cost(row, on_device) for row in self.operators) or 1.0
        lines = [f"{'share':>6} {'device ms':>10} {'CPU ms':>8} {'calls':>8}  operator (per step)"]
        lines += [
            f"{cost(row, on_device) / total:6.1%} {row.device_ms:10.3f} {row.cpu_ms:8.3f} {row.calls:8.1f}  {row.name}"
            for row in self.operators[:NUM_ROWS]
        ]
        return "\n".join(lines)


def cost(operator: Operator, on_device: bool) -> float:
    return operator.device_ms if on_device else operator.cpu_ms


def summarize(profiler: Any, steps: int) -> Summary:
    """What a `torch.profiler.profile` recorded during `steps` steps."""
    events = profiler.events()
    on_device = [event for event in events if event.device_type.name != "CPU" and not event.is_user_annotation]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    marks = [event for event in events if event.name.startswith("ProfilerStep") and event.device_type.name == "CPU"]
    duration = sum(mark.time_range.elapsed_us() for mark in marks) or 1.0
    busy = covered((event.time_range.start, event.time_range.end) for event in on_device) / duration
    rows = [
        Operator(
            row.key if not row.key.startswith("ProfilerStep") else "(between operators)",
            row.count / steps,
            row.self_device_time_total / 1000 / steps,
            row.self_cpu_time_total / 1000 / steps,
        )
        for row in profiler.key_averages()
        if row.device_type.name == "CPU"
    ]
    rows.sort(key=lambda row: cost(row, on_device=busy > 0), reverse=True)
    return Summary(duration / 1000 / steps, len(kernels) / steps, min(1.0, busy), rows)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


class StepProfile:
    """Records `steps` steps of this attempt, after the first ones: a context manager around training.

    Every rank writes its trace to RUN/profile; the main process logs the most expensive operators.
    """

    def __init__(self, folder: Path, steps: int, left: int, runtime: Runtime, files: OptionalFiles, clock: Throughput):
        """`left`: steps until the end of the run, at least `steps`. `clock`: that of the training loop, which does not
        count the work of the profiler.
        """
        self._folder = folder / "profile"
        self._runtime, self._files, self._clock = runtime, files, clock
        warm_up = min(1, left - steps)
        skipped = min(SKIPPED_STEPS, left - steps - warm_up)
        self._profiler = runtime.profiler(skipped, warm_up, steps, self._record)
        self._num_recorded = -skipped - warm_up
        self._step = 0
        self._ended = False  # recorded, or training has failed on some rank

    def __enter__(self) -> "StepProfile":
        self._profiler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._ended = self._ended or kind is not None
        self._profiler.stop()

    def after_step(self, step: int, micro_batches: list[Batch]) -> None:
        """`on_batches` of `Trainer.fit`."""
        if not self._ended:
            self._step = step + 1
            self._num_recorded += 1
            with self._clock.paused():
                self._profiler.step()

    def _record(self, profiler: Any) -> None:
        """All ranks come here after the same step: the last recorded one, or the one that training stopped at."""
        if self._ended or self._num_recorded < 1:
            return
        self._ended = True
        self._runtime.run_on_all(lambda: self._write(profiler), "writing a profile")

    def _write(self, profiler: Any) -> None:
        path = self._folder / f"step_{self._step:08d}_rank_{self._runtime.rank}.json.gz"
        with self._files.writing("profiles", path):
            self._folder.mkdir(exist_ok=True)
            unfinished = path.with_name(f".unfinished_{path.name}")
            profiler.export_chrome_trace(str(unfinished))
            os.replace(unfinished, path)
        advance()
        if self._runtime.is_main:
            summary = summarize(profiler, self._num_recorded)
            log.info(
                "profile of %d steps up to step %d: %s; trace: %s\n%s",
                *(self._num_recorded, self._step, summary.describe(), path, summary.table()),
            )
