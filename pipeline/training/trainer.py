"""The training loop. It takes built objects, knows no particular model, and touches no file itself.

The unit of time is the optimizer step. Learning rate, beta, noise, data order and cadences are functions of it, so a
resumed run needs one integer and the tensors of `TrainingState`, and goes on exactly as if it had never stopped.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.data.loader import Batch
from pipeline.data.shards import UnreadableShard
from pipeline.data.unreadable import SkippedSample
from pipeline.distributed.runtime import Precision, Runtime, raised_on_all_ranks
from pipeline.models.base import VAE
from pipeline.models.noise import draw_noise
from pipeline.schema import Section
from pipeline.tracking.meters import ActiveUnits, Meter, Throughput, bits_per_dimension, gpu_memory
from pipeline.training.objective import Objective
from pipeline.training.optim import LearningRate
from pipeline.training.state import TrainingState

log = logging.getLogger("pipeline")


class TrainConfig(Section):
    """How long, how large, how precisely."""

    steps: int | None = Field(None, gt=0)
    """Optimizer steps of the whole run; or give `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training split, instead of `steps`."""
    batch_size: int = Field(32, gt=0)
    """Images per optimizer step over all processes."""
    micro_batch: int | None = Field(None, gt=0)
    """Images per forward pass over all processes; gradients accumulate up to `batch_size`. Default: the whole batch.
    Batch norm's statistics span one micro-batch over all processes, so runs are equal at equal micro-batch."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Of initial weights, data order, augmentation and latent noise."""
    precision: Precision = "fp32"
    """`bf16`: mixed precision by autocast (densities, KL and likelihoods stay in float32). `fp64` is for tests."""
    channels_last: bool = True
    """Memory layout of images and activations; faster for convolutions on CPUs and GPUs."""
    compile: bool = False
    """Compile the model's cells one by one with torch.compile."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the moving average of weights that validation and samples use; 0: none."""
    cpu_threads: int | None = Field(None, gt=0)
    """Threads of each process on CPU. Default: this machine's cores shared by its processes."""
    expect_processes: int | None = Field(None, gt=0)
    """Refuse to train with any other number of processes."""
    collective_timeout: float = Field(120.0, gt=0)
    """Seconds that processes wait for one that does not come; then all end, and the missing one is named."""
    max_skipped_steps: int = Field(20, gt=0)
    """So many steps in a row with a non-finite loss or gradient end the run."""

    @property
    def images_per_pass(self) -> int:
        """Images per forward pass over all processes."""
        return self.micro_batch or self.batch_size

    @property
    def micro_batches(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_size // self.images_per_pass


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient. The last good checkpoint stays."""


@dataclass
class Cadence:
    """Something that is done every so many steps and after the last one."""

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
        model: VAE,
        wrapped_model: nn.Module,
        state: TrainingState,
        objective: Objective,
        learning_rate: LearningRate,
        clip: float | None,
        total_steps: int,
        batches: Callable[[int], Iterable[Batch]],
        inputs: Callable[[Batch], tuple[Tensor, Tensor | None]],
        report_unreadable: Callable[[int, Sequence[SkippedSample], UnreadableShard | None], int],
    ):
        """`batches(step)` yields this rank's micro-batches from that step on; `inputs` makes of one (b, C, H, W) floats
        and the condition (b, K) or None, on the device. `report_unreadable` is told, on every rank before each step,
        how
        far training will be after it, and what could not be read; it gives the number of samples left out on all
        ranks, or raises on all.
        """
        self.config = config
        self.runtime = runtime
        self.model = model
        self.wrapped_model = wrapped_model
        self.state = state
        self.objective = objective
        self.learning_rate = learning_rate
        self.clip = clip
        self.total_steps = total_steps
        self.batches = batches
        self.inputs = inputs
        self.report_unreadable = report_unreadable
        self.meter = Meter(runtime.device)
        self.active_units = ActiveUnits(group.name for group in model.groups)
        self._forget_statistics()
        self.throughput = Throughput()
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.skipped_samples = 0
        self.cadences: list[Cadence] = []
        self.on_batches: Callable[[int, list[Batch]], None] = lambda step, micro_batches: None
        self.stop_asked: Callable[[], bool] = lambda: False
        self.stopped = False

    # -------------------------------------------------------------------------------------------------- one step

    def train_step(self, step: int, micro_batches: list[Batch]) -> bool:
        """One optimizer step.

        False where a non-finite loss or gradient made every rank skip it; then nothing has changed.
        """
        self._set_learning_rate(self.learning_rate(step))
        self.state.remember_buffers()
        self._forget_statistics()
        total = torch.zeros((), device=self.runtime.device, dtype=self.runtime.dtype)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with self.runtime.accumulate(self.wrapped_model, last):
                loss = self._loss(step, batch) / len(micro_batches)
                if last:
                    loss = loss + self._penalty(step)
                self.runtime.backward(loss)
            total += loss.detach()
        grad_norm = self._clip_gradients()
        sound = self.runtime.agree(torch.isfinite(total) & torch.isfinite(grad_norm))
        if sound:
            self.state.apply_update(step)
            self._note({"loss": total, "grad_norm": grad_norm})
            self._add_statistics()
        else:
            self.state.undo_forward()
        self.state.optimizer.zero_grad(set_to_none=True)
        return sound

    def _loss(self, step: int, batch: Batch) -> Tensor:
        x, condition = self.inputs(batch)
        positions = batch.positions.tolist()
        noise = draw_noise(self.model.noise_groups, self.config.seed, "train", positions, x.device, x.dtype)
        out = self.wrapped_model(x, noise, condition)
        loss, statistics = self.objective(out, step)
        self._note(statistics)
        self._kl_units.append([units.detach() for units in out.kl_units])  # without the graph behind them
        return loss

    def _penalty(self, step: int) -> Tensor:
        penalty, statistics = self.state.regularizers(self.objective.warmup(step))
        self._note(statistics)
        return penalty

    def _note(self, statistics: dict[str, Tensor]) -> None:
        """Keeps figures back until the step is known to be sound."""
        self._statistics.append({name if "/" in name else f"train/{name}": value for name, value in statistics.items()})

    def _add_statistics(self) -> None:
        for statistics in self._statistics:
            self.meter.add_all(statistics, 1)
        for kl_units in self._kl_units:
            self.active_units.add(kl_units)

    def _forget_statistics(self) -> None:
        self._statistics: list[dict[str, Tensor]] = []
        self._kl_units: list[Sequence[Tensor]] = []

    def _clip_gradients(self) -> Tensor:
        """The global gradient norm before clipping."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"), foreach=True)

    def _set_learning_rate(self, value: float) -> None:
        for group in self.state.optimizer.param_groups:
            group["lr"] = value

    # ------------------------------------------------------------------------------------------------ many steps

    def fit(self) -> None:
        """Trains to the last step, or to the step's edge at which some rank was asked to stop: then `stopped` is true.

        Raises TrainingDiverged; whatever a cadence raises passes through.
        """
        stream = iter(self.batches(self.step))
        with self._progress_bar() as bar:
            while self.step < self.total_steps:
                with self.throughput.waiting():
                    micro_batches = self._next_batches(stream)
                if self.stopped:
                    return
                sound = self.train_step(self.step, micro_batches)
                self.throughput.count(self.config.batch_size)
                self.on_batches(self.step, micro_batches)
                self.step += 1
                self._count_skip(sound)
                self._run_cadences()
                bar.update()

    def _next_batches(self, stream: Iterator[Batch]) -> list[Batch]:
        """The next step's micro-batches. What one rank met, damage or a signal, all know before the step."""
        micro_batches, error = [], None
        try:
            micro_batches = list(islice(stream, self.config.micro_batches))
        except UnreadableShard as damaged:
            error = damaged
        skipped = [sample for batch in micro_batches for sample in batch.skipped]
        met_damage, self.stopped = self.runtime.any_of(bool(skipped or error), self.stop_asked())
        if met_damage and not self.stopped:
            self.skipped_samples += self.report_unreadable(self.step + 1, skipped, error)
        return micro_batches

    def _progress_bar(self) -> tqdm:
        hidden = None if self.runtime.is_main else True  # None: shown on a terminal only
        return tqdm(
            total=self.total_steps, initial=self.step, desc="train", unit="step", disable=hidden, smoothing=0.05
        )

    def _run_cadences(self) -> None:
        due = [cadence for cadence in self.cadences if cadence.due(self.step, self.total_steps)]
        if due:
            with self.throughput.paused():
                for cadence in due:
                    cadence.work(self.step)

    def _count_skip(self, sound: bool) -> None:
        self.skipped_in_a_row = 0 if sound else self.skipped_in_a_row + 1
        self.skipped_steps += not sound
        if sound:
            return
        log.warning(
            "step %d: non-finite loss or gradient; skipped on every rank (%d so far)", self.step - 1, self.skipped_steps
        )
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            advice = (
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient. The last checkpoint is "
                "sound: run the same command again with a lower optim.lr, with optim.clip set (for instance "
                "optim.clip=200), or with train.precision=fp32; train.max_skipped_steps says how many are borne."
            )
            raise raised_on_all_ranks(TrainingDiverged(advice))

    # -------------------------------------------------------------------------------------------- interval's end

    def interval_scalars(self) -> dict[str, float]:
        """Means over the steps since the last call and over all ranks; the only place but the step's flag where the
        device is read.
        """
        scalars = self.meter.reduce(self.runtime.sum)
        if "train/elbo" in scalars:
            scalars["train/bpd"] = bits_per_dimension(-scalars["train/elbo"], self.model.num_dimensions)
        scalars["train/beta"] = self.objective.beta(self.step - 1)
        scalars["train/lr"] = self.learning_rate(self.step - 1)
        scalars["train/skipped_steps"] = float(self.skipped_steps)
        scalars["train/skipped_samples"] = float(self.skipped_samples)
        scalars["samples_seen"] = float(self.samples_seen)
        scalars |= self.active_units.reduce(self.runtime.sum)
        return scalars | self.throughput.report() | gpu_memory(self.runtime.device)

    @property
    def samples_seen(self) -> int:
        return self.step * self.config.batch_size

    def averaged_weights(self) -> Any:
        """A context in which the model has its moving average's weights, where there is one."""
        return self.state.ema.applied(self.model) if self.state.ema is not None else nullcontext()

    # --------------------------------------------------------------------------------------------- save, restore

    def progress(self) -> dict[str, int]:
        """The integers that a checkpoint needs beside its tensors."""
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_samples": self.skipped_samples,
        }

    def resume(self, progress: dict[str, int], tensors: dict[str, dict[str, Tensor]]) -> None:
        """Continues from what `progress` and `TrainingState.tensors` gave."""
        self.state.load(tensors, updates=progress["step"] - progress["skipped_steps"])
        self.step = progress["step"]
        self.skipped_steps = progress["skipped_steps"]
        self.skipped_in_a_row = progress["skipped_in_a_row"]
        self.skipped_samples = progress["skipped_samples"]
