"""One training run in its folder, and the work of its cadences."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline.config import dump
from pipeline.data.loader import Batch
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.images import image_grid, reconstruction_grid
from pipeline.evaluation.likelihood_bounds import Evaluator
from pipeline.evaluation.sample_grids import Pictures, plan_grid
from pipeline.recipe import Recipe, build_model
from pipeline.run.build import build_trainer
from pipeline.run.data import RunData
from pipeline.run.data_trace import Trace
from pipeline.run.flops import peak_flops, step_flops
from pipeline.run.interval_lines import IntervalLines
from pipeline.run.step_profile import StepProfile
from pipeline.storage.atomic import atomic_file
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_writer import CheckpointWriter
from pipeline.storage.optional_files import OptionalFiles
from pipeline.storage.pictures import save_png
from pipeline.storage.run_id import find_run_id, write_run_id
from pipeline.storage.status import StatusFile
from pipeline.tracking.meters import BY_RANK, extremes, host_memory
from pipeline.tracking.tracker import Tracker
from pipeline.training.trainer import Cadence
from shard_data.terminal import Progress

log = logging.getLogger("pipeline")


class Session:
    """A run in its folder. `run()` trains to the end; `pipeline.run.resume.restore` continues from a checkpoint."""

    def __init__(self, recipe: Recipe, runtime: Runtime, folder: Path, check_folder: Callable[[], None] = lambda: None):
        """`check_folder` raises where this process has lost the run folder; it is called before writing there."""
        self.recipe = recipe
        self.runtime = runtime
        self.folder = folder
        self.data = RunData(recipe, runtime)
        self.trainer = build_trainer(recipe, runtime, self.data)
        config = recipe.checkpoint
        self.checkpoints = Checkpoints(
            folder / "checkpoints", config.keep, find_run_id(folder), check_folder, config.milestones
        )
        self.pictures = Pictures(recipe.samples, recipe.train.seed, runtime.device, runtime.dtype, runtime.autocast)
        self.evaluator = Evaluator(recipe.validation, self.data, runtime, recipe.train.seed)
        self.settings: dict[str, Any] = recipe.model_dump(mode="json")
        self.validated: tuple[int, float] | None = None  # step and its negative ELBO, nats
        self.peak_flops = peak_flops(runtime.device_name, recipe.train.precision)
        self.tracker: Tracker | None = None
        self.status = StatusFile(folder)
        self.files = OptionalFiles()
        self.lines = IntervalLines(self.trainer.total_steps, recipe.train.batch_size)
        self.writer: CheckpointWriter | None = (
            None  # on the main process, while training: every rank has the same state
        )
        self.initialized_from: dict[str, Any] | None = None  # what is stated of the weights that `--init` took
        self.saved_step: int | None = None
        self.stall_ms = 0.0

    # ------------------------------------------------------------------------------------------------- training

    @property
    def finished(self) -> bool:
        return self.trainer.step >= self.trainer.total_steps

    @property
    def keeps_best(self) -> bool:
        """Whether validation chooses a best checkpoint: not on the test set, whose figures would then be too good."""
        return self.recipe.validation.split != "test"

    def run(self, tracker: Tracker, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Trains to the last step. Returns False where `should_stop` was true on some rank before it. In both cases the
        state is in a checkpoint.

        Raises OSError on every rank where that last checkpoint cannot be written; earlier ones may fail.
        """
        self.tracker = tracker
        if self.runtime.is_main:
            self._write_facts()
        recipe = self.recipe
        self.runtime.run_on_main(
            lambda: self.data.unreadable.open(self.folder, self.trainer.step), f"reading {self.folder}"
        )
        cadences = [
            Cadence(recipe.validation.every, self.validate),
            Cadence(recipe.tracking.log_every, self.report),
            Cadence(recipe.samples.every, self.sample),
            Cadence(recipe.checkpoint.every, self.save),
        ]
        if not self.runtime.is_main:
            return self._train(cadences, should_stop)
        with CheckpointWriter(self.checkpoints, self._report_unsaved, on_written=self.status.saved) as self.writer:
            return self._train(cadences, should_stop)

    def _write_facts(self) -> None:
        """The run's id and settings. Both are in every checkpoint too."""
        with self.files.writing("copies of the run's id", self.folder / "run_id"):
            write_run_id(self.folder, self.checkpoints.run_id)
        path = self.folder / "config.yaml"
        with self.files.writing("copies of the settings", path), atomic_file(path) as file:
            file.write(dump(self.recipe).encode())

    def _train(self, cadences: list[Cadence], should_stop: Callable[[], bool]) -> bool:
        trainer, observers = self.trainer, []
        if self.recipe.data.trace:
            observers.append(Trace(self.folder, trainer.step, self.data.train, self.runtime, self.files).add)
        bar = Progress("train", trainer.total_steps, "steps", trainer.step, write=None, shown=self.runtime.is_main)
        with ExitStack() as stack:
            stack.enter_context(bar)
            left = trainer.total_steps - trainer.step
            if num_steps := min(self.recipe.train.profile, left):
                profile = StepProfile(self.folder, num_steps, left, self.runtime, self.files, trainer.throughput)
                observers.append(stack.enter_context(profile).after_step)

            def on_batches(step: int, micro_batches: list[Batch]) -> None:
                for observe in observers:
                    observe(step, micro_batches)
                bar.update()

            completed = trainer.fit(cadences, should_stop, on_batches)
        if not completed:
            self.save(self.trainer.step)
        self.runtime.run_on_main(lambda: self.writer.finish(), f"writing a checkpoint to {self.checkpoints.folder}")
        return completed

    def _report_unsaved(self, step: int, message: str) -> None:
        self.tracker.alert("A checkpoint was not written", f"Step {step}: {message}. Training continues.")

    @cached_property
    def flops_per_image(self) -> int:
        """Of a training step."""
        with torch.device("meta"):
            return step_flops(build_model(self.recipe), batch_size=1)

    # -------------------------------------------------------------------------------------------------- cadences

    def report(self, step: int) -> None:
        """Logs means over the interval to metrics.jsonl, W&B and the terminal."""
        self.checkpoints.check()
        scalars = self.trainer.interval_scalars() | host_memory()
        scalars |= extremes(self.runtime.gather_objects({name: scalars[name] for name in BY_RANK if name in scalars}))
        if self.peak_flops and "perf/images_per_second" in scalars:
            flops = scalars["perf/images_per_second"] * self.flops_per_image  # per second, of all devices
            scalars["perf/mfu"] = flops / (self.peak_flops * self.runtime.world_size)
        if self.stall_ms:
            scalars["perf/checkpoint_stall_ms"], self.stall_ms = self.stall_ms, 0.0
        self.tracker.log(step, scalars)
        log.info("%s", self.lines.training(step, scalars))

    def validate(self, step: int) -> None:
        """Metrics of the held-out split, with the averaged weights if there are any."""
        self.checkpoints.check()
        with self.trainer.averaged_weights():
            figures = self.evaluator.run(self.trainer.model, step)
        self.validated = step, -figures["val/elbo"]
        self.tracker.log(step, figures)
        log.info("%s", self.lines.validation(step, figures))

    def sample(self, step: int) -> None:
        """Prior samples and reconstructions, as PNG files and in W&B.

        Every rank samples, since batch norm may need all of them; the main process writes.
        """
        self.checkpoints.check()
        samples = self.recipe.samples
        x, condition = self.data.held_out_inputs(max(samples.reconstructions, samples.count))
        grid = plan_grid(samples.count, self.recipe.condition, condition)
        shown = slice(samples.reconstructions)
        with self.trainer.averaged_weights():
            sampled = self.pictures.samples(self.trainer.model, grid)
            grids = {name: image_grid(images, columns=grid.columns) for name, images in sampled.items()}
            if samples.reconstructions:
                shown_condition = None if condition is None else condition[shown]
                reconstructed = self.pictures.reconstructions(self.trainer.model, x[shown], shown_condition)
                grids["reconstructions"] = reconstruction_grid(x[shown].float().cpu(), reconstructed, columns=8)
        if self.runtime.is_main:
            for name, grid in grids.items():
                folder, _, suffix = name.partition("/")
                path = self.folder / folder / f"step_{step:08d}{'_' + suffix if suffix else ''}.png"
                with self.files.writing("pictures", path):
                    path.parent.mkdir(exist_ok=True)
                    save_png(path, grid)
        self.tracker.log(step, {}, grids)

    def save(self, step: int) -> None:
        """A checkpoint, written by the main process while training continues. All ranks wait for the previous one."""
        self.checkpoints.check()
        if step == self.saved_step:
            return
        self.saved_step = step
        folder = self.checkpoints.folder
        self.runtime.run_on_main(lambda: self._hand_to_writer(step), f"writing a checkpoint to {folder}")

    def _hand_to_writer(self, step: int) -> None:
        is_current = self.validated is not None and self.validated[0] == step
        score = self.validated[1] if is_current and self.keeps_best else None
        self.tracker.sync()
        stall = self.writer.save(step, self.trainer.state.tensors(), self._facts(), score)
        self.stall_ms = max(self.stall_ms, stall)

    def _facts(self) -> dict[str, Any]:
        origin = {"initialized_from": self.initialized_from} if self.initialized_from else {}
        return origin | {
            "progress": self.trainer.counters(),
            "settings": self.settings,
            "data_fingerprint": self.data.train.fingerprint,
            "holdout": self.data.holdout,
            "classes": self.data.train.classes and list(self.data.train.classes),
            "torch": torch.__version__,
            "world_size": self.runtime.world_size,
        }
