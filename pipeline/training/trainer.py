"""The training loop. It takes built objects, depends on no particular model, and touches no file itself.

The unit of time is the optimizer step. Learning rate, beta, noise, data order and cadences are functions of it, so a
resumed run needs a few integers and the tensors of `TrainingState`, and continues exactly like an uninterrupted one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.loader import Batch
from pipeline.data.shards import UnreadableShard
from pipeline.data.training_data import TrainingData
from pipeline.distributed.runtime import Runtime
from pipeline.models.base import VAE
from pipeline.models.noise import draw_noise
from pipeline.tracking.meters import Throughput, bits_per_dimension, gpu_memory
from pipeline.training.gradients import GradientRules
from pipeline.training.objective import Objective
from pipeline.training.optim import LearningRate
from pipeline.training.progress import Progress, SkipReason
from pipeline.training.state import Tensors, TrainingState
from pipeline.training.step_statistics import StepStatistics
from pipeline.training.train_config import TrainConfig


@dataclass
class Cadence:
    """Work that is done every `every` steps and after the last one."""

    every: int
    work: Callable[[int], None]

    def due(self, step: int, last: int) -> bool:
        return self.every > 0 and (step % self.every == 0 or step == last)


class Trainer:
    """`fit()` runs from the current step to the last one."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        runtime: Runtime,
        data: TrainingData,
        state: TrainingState,
        wrapped_model: nn.Module,
        objective: Objective,
        learning_rate: LearningRate,
        gradients: GradientRules,
    ):
        """`wrapped_model` is `state.model` as `Runtime.prepare` returned it."""
        self.config = config
        self.runtime = runtime
        self.data = data
        self.state = state
        self.model: VAE = state.model
        self.wrapped_model = wrapped_model
        self.objective = objective
        self.learning_rate = learning_rate
        self.gradients = gradients
        self.total_steps = data.total_steps
        self.progress = Progress()
        self.statistics = StepStatistics(runtime.device, (group.name for group in self.model.groups))
        self.throughput = Throughput()
        self._is_compiled = config.compile == "off" or runtime.world_size == 1  # alone, the first step compiles

    # -------------------------------------------------------------------------------------------------- one step

    def train_step(self, step: int, micro_batches: list[Batch]) -> SkipReason | None:
        """One optimizer step. Returns why it was skipped, None where it was not.

        Every rank skips a step where loss or gradient was not finite on some rank, or the gradient's norm too large.
        Such a step changes nothing.
        """
        self._set_learning_rate(self.learning_rate(step))
        self.state.remember_buffers()
        self.statistics.discard()
        total = torch.zeros((), device=self.runtime.device, dtype=self.runtime.dtype)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with self.runtime.accumulate(self.wrapped_model, last):
                loss = self._loss(step, batch) / len(micro_batches)
                if last:
                    loss = loss + self._penalty(step)
                self.runtime.backward(self.gradients.in_unit(loss))
            total += loss.detach()
        grad_norm = self.gradients.clip(self.model)
        taken = self.runtime.agree(torch.isfinite(total) & self.gradients.allow(grad_norm))
        if taken:
            self.state.apply_update(step)
            self.statistics.add({"loss": total, "grad_norm": grad_norm})
            self.statistics.commit()
        else:
            self.state.undo_forward()
        self.state.optimizer.zero_grad(set_to_none=True)
        return None if taken else self.gradients.skip_reason(grad_norm)

    def _loss(self, step: int, batch: Batch) -> Tensor:
        x, condition = self.data.model_inputs(batch)
        positions = batch.positions.tolist()
        noise = draw_noise(self.model.noise_groups, self.config.seed, "train", positions, x.device, x.dtype)
        out = self.wrapped_model(x, noise, condition)
        loss, statistics = self.objective(out, step)
        self.statistics.add(statistics)
        self.statistics.add_kl_units(out.kl_units)
        return loss

    def _penalty(self, step: int) -> Tensor:
        penalty, statistics = self.state.regularizers(self.objective.warmup(step))
        self.statistics.add(statistics)
        return penalty

    def _set_learning_rate(self, value: float) -> None:
        for group in self.state.optimizer.param_groups:
            group["lr"] = value

    # ------------------------------------------------------------------------------------------------ many steps

    def fit(
        self,
        cadences: Sequence[Cadence] = (),
        should_stop: Callable[[], bool] = lambda: False,
        on_batches: Callable[[int, list[Batch]], None] = lambda step, micro_batches: None,
    ) -> bool:
        """Trains to the last step. Returns False where `should_stop`, which is called before each step, was true on
        some rank before that: then every rank stops before the same step.

        `on_batches` is called after each step with the step and its micro-batches, before the cadences. Raises
        TrainingDiverged; other exceptions of the callbacks pass through.
        """
        stream = iter(self.data.batches(self.step))
        self.throughput.restart()
        while self.step < self.total_steps:
            with self.throughput.waiting():
                micro_batches = self._next_batches(stream, should_stop)
            if micro_batches is None:
                return False
            if not self._is_compiled:
                self._compile(micro_batches[0])
            skipped = self.train_step(self.step, micro_batches)
            self.throughput.count(self.config.batch_size)
            on_batches(self.step, micro_batches)
            self.progress.count_step(skipped, self.config.max_skipped_steps)
            self._run_cadences(cadences)
        return True

    def _next_batches(self, stream: Iterator[Batch], should_stop: Callable[[], bool]) -> list[Batch] | None:
        """The micro-batches of the next step, or None to stop. All ranks agree on both before the step."""
        micro_batches, error = [], None
        try:
            micro_batches = list(islice(stream, self.config.micro_batches))
        except UnreadableShard as unreadable:
            error = unreadable
        skipped = [sample for batch in micro_batches for sample in batch.skipped]
        any_unreadable, stop = self.runtime.any_of(bool(skipped or error), should_stop())
        if stop:
            return None
        if any_unreadable:
            self.progress.skipped_samples += self.data.report_unreadable(self.step + 1, skipped, error)
        return micro_batches

    def _compile(self, batch: Batch) -> None:
        """Compiles the passes of a step where no rank waits in a collective for a slower one. Changes nothing else."""
        with self.throughput.paused():
            self.runtime.run_on_all(lambda: self._rehearse(batch), "compiling the model")
        self._is_compiled = True

    def _rehearse(self, batch: Batch) -> None:
        self.state.remember_buffers()
        with self.runtime.rehearsing(), self.runtime.accumulate(self.wrapped_model, last=False):
            self.runtime.backward(self._loss(self.step, batch))
        self.state.undo_forward()
        self.statistics.discard()
        self.state.optimizer.zero_grad(set_to_none=True)

    def _run_cadences(self, cadences: Sequence[Cadence]) -> None:
        due = [cadence for cadence in cadences if cadence.due(self.step, self.total_steps)]
        if due:
            with self.throughput.paused():
                for cadence in due:
                    cadence.work(self.step)

    # -------------------------------------------------------------------------------------------- interval's end

    def interval_scalars(self) -> dict[str, float]:
        """Means over the steps since the last call and over all ranks. Apart from the finite flag of each step, this is
        the only place that reads the device.
        """
        scalars = self.statistics.reduce(self.runtime.sum)
        if "train/elbo" in scalars:
            scalars["train/bpd"] = bits_per_dimension(-scalars["train/elbo"], self.model.num_dimensions)
        scalars["train/beta"] = self.objective.beta(self.step - 1)
        scalars["train/lr"] = self.learning_rate(self.step - 1)
        scalars |= self.progress.scalars(by_norm=self.gradients.skip_threshold > 0)
        scalars["samples_seen"] = float(self.samples_seen)
        return scalars | self.throughput.report() | gpu_memory(self.runtime.device)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.progress.step

    @property
    def samples_seen(self) -> int:
        return self.step * self.config.batch_size

    def averaged_weights(self) -> Any:
        """A context in which the model has its moving average's weights, where there is one."""
        return self.state.ema.applied(self.model) if self.state.ema is not None else nullcontext()

    # --------------------------------------------------------------------------------------------- save, restore

    def counters(self) -> dict[str, int]:
        """The integers that a checkpoint needs beside its tensors."""
        return asdict(self.progress) | {"samples_seen": self.samples_seen}

    def resume(self, progress: Progress, tensors: Tensors) -> None:
        """Continues from what `Progress.read` and `TrainingState.tensors` gave. Raises ValueError as
        `TrainingState.load` does.
        """
        self.state.load(tensors, updates=progress.step - progress.skipped_steps)
        self.progress = progress
