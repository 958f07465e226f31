"""Builds a trainer from a recipe."""

import torch

from pipeline.distributed.runtime import Runtime
from pipeline.models.base import VAE, recompute_activations, use_channels_last
from pipeline.models.classifier import FrozenClassifier
from pipeline.recipe import Recipe, build_model
from pipeline.run.classifier_folder import load_frozen_classifier
from pipeline.run.compilation import compile_training, prepare_compiler
from pipeline.run.data import RunData
from pipeline.training.ema import EMA
from pipeline.training.gradients import GradientRules
from pipeline.training.objective import Objective
from pipeline.training.optim import LearningRate, build_optimizer
from pipeline.training.regularizers import Regularizers
from pipeline.training.state import TrainingState
from pipeline.training.train_config import TrainConfig
from pipeline.training.trainer import Trainer


def build_runtime(train: TrainConfig) -> Runtime:
    """This process among those that the launcher started. Raises what `Runtime` raises."""
    return Runtime(
        train.precision,
        train.cpu_threads,
        train.expect_processes,
        train.collective_timeout,
        train.progress_timeout,
        train.device_settings,
        train.ddp_bucket_mb,
    )


def build_training_model(recipe: Recipe, runtime: Runtime, classifier: FrozenClassifier | None) -> VAE:
    """The recipe's model as training uses it: with its precision, memory format and recomputation, on the device."""
    model = build_model(recipe, classifier).to(runtime.dtype)
    if recipe.train.channels_last:
        use_channels_last(model)
    recompute_activations(model, recipe.train.recompute)
    return model.to(runtime.device)


def build_trainer(recipe: Recipe, runtime: Runtime, data: RunData) -> Trainer:
    """The trainer at step 0. The initial weights depend on the recipe's seed alone."""
    train = recipe.train
    folder = recipe.model.classifier_folder
    classifier = runtime.run_on_all(lambda: load_frozen_classifier(folder), "reading a classifier") if folder else None
    torch.manual_seed(train.seed)
    model = build_training_model(recipe, runtime, classifier)
    objective = Objective(recipe.objective, model.groups, data.total_steps, runtime.mean)
    if train.compile != "off":
        runtime.run_on_all(lambda: prepare_compiler(train, runtime.device), "trying the compiler")
        compile_training(train, model, objective)
    wrapped, optimizer = runtime.prepare(model, build_optimizer(model, recipe.optim))
    ema = EMA(model, train.ema_decay, train.ema_warmup) if train.ema_decay else None
    steps_per_epoch = data.order.epoch_size / train.batch_size
    return Trainer(
        train,
        runtime=runtime,
        data=data,
        state=TrainingState(model, optimizer, Regularizers(recipe.regularizers, model, train.seed), ema),
        wrapped_model=wrapped,
        objective=objective,
        learning_rate=LearningRate(recipe.optim, data.total_steps, steps_per_epoch),
        gradients=GradientRules(recipe.optim, model.num_dimensions),
    )
