"""A trainer put together from a recipe, and the model's form in memory."""

import torch

from pipeline.distributed.runtime import Runtime
from pipeline.models.base import VAE
from pipeline.nn.batch_norm import keep_collectives_uncompiled
from pipeline.recipe import Recipe, build_model
from pipeline.run.classifier_folder import load_frozen_classifier
from pipeline.run.data import RunData
from pipeline.training.ema import EMA
from pipeline.training.objective import Objective
from pipeline.training.optim import LearningRate, build_optimizer
from pipeline.training.regularizers import Regularizers
from pipeline.training.state import TrainingState
from pipeline.training.trainer import Trainer


def build_trainer(recipe: Recipe, runtime: Runtime, data: RunData) -> Trainer:
    """The trainer at step 0. The initial weights depend on the recipe's seed alone."""
    train = recipe.train
    folder = recipe.model.classifier_folder
    classifier = runtime.run_on_all(lambda: load_frozen_classifier(folder), "reading a classifier") if folder else None
    torch.manual_seed(train.seed)
    model = build_model(recipe, classifier).to(runtime.dtype)
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
        data=data,
        state=TrainingState(model, optimizer, Regularizers(recipe.regularizers, model, train.seed), ema),
        wrapped_model=wrapped,
        objective=Objective(recipe.objective, model.groups, data.total_steps, runtime.mean),
        learning_rate=LearningRate(recipe.optim, data.total_steps, steps_per_epoch),
        clip=recipe.optim.clip,
    )


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
