"""One training run: its folder, its parts put together from a recipe, and what is done at which cadence."""

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import Checkpoint, Checkpoints
from pipeline.checkpoint_writer import CheckpointWriter
from pipeline.config import dump
from pipeline.damage import DamageLog
from pipeline.data.damage import LeftOut
from pipeline.data.loader import Batch, build_eval_loader, build_train_loader, check_data
from pipeline.data.order import Order
from pipeline.data.preprocess import Preprocess, to_model_input
from pipeline.data.remote import check_address, default_cache, fetch_manifest, fetch_set, is_address
from pipeline.data.shards import DamagedShard, TarShards
from pipeline.data_trace import Trace
from pipeline.ema import EMA
from pipeline.evaluation import Evaluator
from pipeline.files import replacing
from pipeline.flops import peak_flops, step_flops
from pipeline.images import image_grid, reconstruction_grid, save_png
from pipeline.models.base import VAE
from pipeline.nn.batch_norm import keep_collectives_uncompiled
from pipeline.objective import Objective
from pipeline.optim import LearningRate, build_optimizer
from pipeline.recipe import Recipe, build_model, total_steps
from pipeline.regularizers import Regularizers
from pipeline.resume import changed_settings, check_fingerprint
from pipeline.runtime import Runtime
from pipeline.sampling import Pictures, plan_grid
from pipeline.state import TrainingState
from pipeline.status import StatusFile
from pipeline.tracking import Tracker
from pipeline.trainer import Cadence, Trainer

log = logging.getLogger("pipeline")

SHOWN = ("train/loss", "train/elbo", "train/bpd", "train/kl", "train/lr", "perf/images_per_second")
"""The figures of `metrics.jsonl` that the terminal shows too."""


class Data:
    """The shard set of a run as its parts need it: micro-batches for training, a split for validation, floats for the
    model.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime):
        self.recipe = recipe
        self.runtime = runtime
        config = recipe.data
        self.train, self.held_out = self._open_shards()
        check_data(config, self.train)
        if recipe.condition is not None:
            recipe.condition.check(self.train.classes, self.train.attribute_names)
        self.order = Order(self.train.shard_sizes, recipe.train.seed, config.window)
        self.damage = DamageLog(runtime)
        self._augment = Preprocess(recipe.train.seed, flip=config.flip, binarise=config.binarise, pad=config.pad)
        self._plain = Preprocess(recipe.train.seed, binarise=config.binarise, pad=config.pad)

    def _open_shards(self) -> list[TarShards]:
        """Of the training and the validation split; from an address, they are fetched first."""
        config, runtime = self.recipe.data, self.runtime
        verify = config.verify and config.on_error == "raise"  # a hash does not tell which sample to leave out
        splits = config.train_split, self.recipe.validation.split
        if not is_address(config.root):
            return runtime.together(lambda: [TarShards(config.root, split, verify) for split in splits])
        address = check_address(config.root)
        manifest = runtime.from_main(runtime.on_main(lambda: fetch_manifest(address)))
        cache = Path(config.cache) if config.cache else default_cache()
        folder = runtime.together(lambda: fetch_set(address, manifest, splits, cache, progress=runtime.is_main))
        return [TarShards(folder, split, verify, origin=address) for split in splits]

    def batches(self, step: int) -> Iterable[Batch]:
        """This rank's micro-batches from optimizer step `step` to the end of the run."""
        train = self.recipe.train
        return build_train_loader(
            self.train,
            self._augment,
            self.order,
            micro_batch=train.images_per_pass,
            start=step * train.micro_batches,
            stop=self.total_steps * train.micro_batches,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            workers=self.recipe.data.workers,
            pin_memory=self.runtime.device.type == "cuda",
            on_error=self.recipe.data.on_error,
        )

    def held_out_batches(self) -> Iterable[Batch]:
        """This rank's share of the validation images, in their natural order."""
        config = self.recipe.validation
        return build_eval_loader(
            self.held_out,
            self._plain,
            batch_size=config.batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            limit=config.images,
            on_error=self.recipe.data.on_error,
        )

    def held_out_inputs(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The first `count` images of the validation split as model input, and their conditions, the same on every
        rank; fewer where some are left out.
        """
        on_error = self.recipe.data.on_error
        batches = build_eval_loader(self.held_out, self._plain, batch_size=count, on_error=on_error)
        return self.inputs(self.runtime.together(lambda: first_with_images(batches)))

    def settle_training(self, step: int, left_out: Sequence[LeftOut], error: DamagedShard | None) -> int:
        """See DamageLog.settle, of the training split."""
        return self.damage.settle(step, self.train.split, left_out, error)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the model takes of a batch, on the device: (b, C, H, W) in [0, 1], and (b, K) or None."""
        device, dtype = self.runtime.device, self.runtime.dtype
        x = to_model_input(batch.images.to(device, non_blocking=True), self.recipe.data.bits, dtype)
        if self.recipe.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.recipe.condition is None:
            return x, None
        condition = self.recipe.condition.encode(batch.labels, batch.attributes, self.train.attribute_names)
        return x, condition.to(device, dtype, non_blocking=True)

    @property
    def total_steps(self) -> int:
        return total_steps(self.recipe, self.order.epoch_size)


def build_trainer(recipe: Recipe, runtime: Runtime, data: Data) -> Trainer:
    """The trainer at step 0. Weights are drawn from the recipe's seed, alike on every rank."""
    train = recipe.train
    torch.manual_seed(train.seed)
    model = build_model(recipe).to(runtime.dtype)
    if train.channels_last:
        use_channels_last(model)
    if train.compile:
        compile_cells(model)
    model.to(runtime.device)
    wrapped, optimizer = runtime.prepare(model, build_optimizer(model, recipe.optim))
    ema = EMA(model, train.ema_decay) if train.ema_decay else None
    steps_per_epoch = data.order.epoch_size / train.batch_size
    return Trainer(
        train,
        runtime=runtime,
        model=model,
        wrapped_model=wrapped,
        state=TrainingState(model, optimizer, Regularizers(recipe.regularizers, model, train.seed), ema),
        objective=Objective(recipe.objective, model.groups, data.total_steps, runtime.mean),
        learning_rate=LearningRate(recipe.optim, data.total_steps, steps_per_epoch),
        clip=recipe.optim.clip,
        total_steps=data.total_steps,
        batches=data.batches,
        inputs=data.inputs,
        settle_damage=data.settle_training,
    )


def first_with_images(batches: Iterable[Batch]) -> Batch:
    """The first batch of which something could be read. Raises DamagedShard where there is none."""
    for batch in batches:
        if len(batch.images):
            return batch
    raise DamagedShard(f"no sample can be read; the last problem: {batch.left_out[-1].problem}")


def use_channels_last(model: VAE) -> None:
    """Lays out convolution weights as their activations will be."""
    model.to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        if parameter.dim() == 4 and parameter.is_contiguous():
            # 1x1 and depthwise kernels are in both layouts at once; DDP compares strides, and gradients have these.
            plain = torch.empty(parameter.shape, device="meta").stride()
            parameter.data = parameter.data.as_strided(parameter.shape, plain)


def compile_cells(model: VAE) -> None:
    """Compiles the model's cells one by one, each for the one shape that it sees."""
    keep_collectives_uncompiled()
    cells = list(model.compilable_cells())
    # Cells share their code, for which the compiler would give up after 8 shapes (or modes, training and evaluation).
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(cells))
    for cell in cells:
        cell.compile(dynamic=False)


class Session:
    """A run in its folder. `resume()` continues from a checkpoint; `run()` trains to the end."""

    def __init__(self, recipe: Recipe, runtime: Runtime, folder: Path):
        self.recipe = recipe
        self.runtime = runtime
        self.folder = folder
        self.data = Data(recipe, runtime)
        self.trainer = build_trainer(recipe, runtime, self.data)
        self.checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint.keep)
        self.pictures = Pictures(recipe.samples, recipe.train.seed, runtime.device, runtime.dtype, runtime.autocast)
        self.evaluator = Evaluator(
            recipe.validation,
            batches=self.data.held_out_batches,
            inputs=self.data.inputs,
            seed=recipe.train.seed,
            device=runtime.device,
            autocast=runtime.autocast,
            sum_over_ranks=runtime.sum,
            settle_damage=self._settle_validation,
        )
        self.settings: dict[str, Any] = recipe.model_dump(mode="json")
        self.validated: tuple[int, float] | None = None  # step and its negative ELBO, nats
        self.peak_flops = peak_flops(runtime.device_name, recipe.train.precision)
        self.tracker: Tracker | None = None
        self.status = StatusFile(folder)
        self.writer: CheckpointWriter | None = (
            None  # on the main process, while training: every rank has the same state
        )
        self.saved_step: int | None = None
        self.stall_ms = 0.0

    # ------------------------------------------------------------------------------------------------- beginning

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint. Raises ValueError where it belongs to another model, recipe or data set."""
        check_fingerprint(checkpoint.facts["data_fingerprint"], self.data.train.fingerprint)
        for change in changed_settings(checkpoint.facts["settings"], self.settings):
            log.info("changed since the checkpoint: %s", change)
        self.trainer.resume(checkpoint.facts["progress"], checkpoint.tensors)
        self.saved_step = self.trainer.step
        log.info("resumed from %s at step %d", checkpoint.path, self.trainer.step)

    @property
    def finished(self) -> bool:
        return self.trainer.step >= self.trainer.total_steps

    def run(self, tracker: Tracker) -> None:
        """Trains to the last step, or until `trainer.stop_asked` on some rank. Then the state is in a checkpoint.

        Raises OSError on every rank where that last checkpoint cannot be written; earlier ones may fail.
        """
        self.tracker = tracker
        if self.runtime.is_main:
            with replacing(self.folder / "config.yaml") as file:
                file.write(dump(self.recipe).encode())
        recipe, trainer = self.recipe, self.trainer
        self.runtime.on_main(lambda: self.data.damage.open(self.folder, trainer.step))
        trainer.cadences = [
            Cadence(recipe.validation.every, self.validate),
            Cadence(recipe.tracking.log_every, self.report),
            Cadence(recipe.samples.every, self.draw),
            Cadence(recipe.checkpoint.every, self.save),
        ]
        if recipe.data.trace:
            trainer.on_batches = Trace(self.folder, trainer.step, self.data.train, self.runtime).add
        if not self.runtime.is_main:
            self._train()
            return
        with CheckpointWriter(self.checkpoints, self._report_unsaved) as self.writer:
            self._train()

    def _train(self) -> None:
        self.trainer.fit()
        if self.trainer.stopped:
            self.save(self.trainer.step)
        self.runtime.on_main(lambda: self.writer.finish())  # the other ranks wait for the disk in patience

    def _report_unsaved(self, step: int, message: str) -> None:
        self.tracker.alert(f"checkpoint of step {step} not written", f"{message}. Training goes on.")

    @cached_property
    def flops_per_image(self) -> int:
        """Of a training step."""
        with torch.device("meta"):
            return step_flops(build_model(self.recipe), batch_size=1)

    # -------------------------------------------------------------------------------------------------- cadences

    def report(self, step: int) -> None:
        """Means over the interval, to metrics.jsonl, W&B and the terminal."""
        scalars = self.trainer.interval_scalars()
        if self.peak_flops and "perf/images_per_second" in scalars:
            speed = scalars["perf/images_per_second"] * self.flops_per_image  # FLOP/s of all devices
            scalars["perf/mfu"] = speed / (self.peak_flops * self.runtime.world_size)
        if self.stall_ms:
            scalars["perf/checkpoint_stall_ms"], self.stall_ms = self.stall_ms, 0.0
        self.tracker.log(step, scalars)
        shown = [f"{name.split('/')[-1]} {scalars[name]:.4g}" for name in SHOWN if name in scalars]
        log.info("step %d/%d  %s", step, self.trainer.total_steps, "  ".join(shown))

    def validate(self, step: int) -> None:
        """Held-out figures of the averaged weights, where there are any."""
        with self.trainer.averaged_weights():
            figures = self.evaluator.run(self.trainer.model)
        self.validated = step, -figures["val/elbo"]
        self.tracker.log(step, figures)
        log.info(
            "step %d validation: %s", step, "  ".join(f"{name[4:]} {value:.4f}" for name, value in figures.items())
        )

    def _settle_validation(self, left_out: Sequence[LeftOut], error: DamagedShard | None) -> int:
        return self.data.damage.settle(self.trainer.step, self.data.held_out.split, left_out, error)

    def draw(self, step: int) -> None:
        """Prior samples and reconstructions, as PNG files and in W&B.

        Every rank draws (batch norm may have to talk); one writes.
        """
        samples = self.recipe.samples
        x, condition = self.data.held_out_inputs(max(samples.reconstructions, samples.count))
        grid = plan_grid(samples.count, self.recipe.condition, condition)
        shown = slice(samples.reconstructions)
        with self.trainer.averaged_weights():
            drawn = self.pictures.samples(self.trainer.model, grid)
            grids = {name: image_grid(images, columns=grid.columns) for name, images in drawn.items()}
            if samples.reconstructions:
                told = None if condition is None else condition[shown]
                reconstructed = self.pictures.reconstructions(self.trainer.model, x[shown], told)
                grids["reconstructions"] = reconstruction_grid(x[shown].float().cpu(), reconstructed, columns=8)
        if self.runtime.is_main:
            for name, grid in grids.items():
                folder, _, suffix = name.partition("/")
                save_png(self.folder / folder / f"step_{step:08d}{'_' + suffix if suffix else ''}.png", grid)
        self.tracker.log(step, {}, grids)

    def save(self, step: int) -> None:
        """A checkpoint, written by the main process while training goes on."""
        if self.writer is None or step == self.saved_step:
            return
        score = self.validated[1] if self.validated and self.validated[0] == step else None
        self.tracker.sync()
        stall = self.writer.save(step, self.trainer.state.tensors(), self._facts(), score)
        self.stall_ms = max(self.stall_ms, stall)
        self.saved_step = step
        self.status.saved(step)

    def _facts(self) -> dict[str, Any]:
        return {
            "progress": self.trainer.progress(),
            "settings": self.settings,
            "data_fingerprint": self.data.train.fingerprint,
            "torch": torch.__version__,
            "world_size": self.runtime.world_size,
        }


def choose_checkpoint(checkpoints: Checkpoints, resume: str) -> Checkpoint | None:
    """The checkpoint that `--resume` means: `auto` the run's latest, `never` none, or a path to start this run from.

    A run that has checkpoints of its own goes on from them also when a path is given, so that repeating a command
    continues it. Raises ValueError where `never` meets a run that has some, or a path has none.
    """
    if resume == "never":
        if checkpoints.steps():
            raise ValueError(
                f"--resume never: {checkpoints.folder} holds checkpoints up to step {checkpoints.steps()[-1]}; "
                "name another --run-dir, or remove that folder"
            )
        return None
    own = checkpoints.latest()
    if own is not None or resume == "auto":
        return own
    return checkpoints.load(resume)


def describe(recipe: Recipe) -> str:
    """What --dry-run prints of a recipe's model: parameters, groups and memory."""
    with torch.device("meta"):
        model = build_model(recipe)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    copies = 4 + bool(recipe.train.ema_decay)  # weights, gradients, two moments of the optimizer, moving average
    mib = 4 * parameters / 2**20
    averaged = " and moving average" if recipe.train.ema_decay else ""
    dimensions = sum(torch.Size(group.shape).numel() for group in model.groups)
    lines = [
        f"model       {recipe.model.name}: {parameters:,} parameters in {len(list(model.parameters()))} tensors",
        f"memory      {mib:,.1f} MiB of weights; {copies * mib:,.1f} MiB with gradients, optimizer{averaged}",
        f"latents     {len(model.groups)} groups, {dimensions:,} dimensions",
        *(f"  {group.name:<18} {'x'.join(map(str, group.shape))}" for group in model.groups),
    ]
    return "\n".join(lines)
