"""The recipes of the paper against the paper's table of settings, and their models against what the release makes."""

from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from torch import nn

from benchmarks.steps import IMAGES_PER_GPU, new_trainer, train
from pipeline.models.nvae import NVAE
from pipeline.models.nvae_conversion import reference_parameter_names
from pipeline.models.nvae_options import ReleaseOptions
from pipeline.nn.layers import find_convs
from pipeline.recipe import Recipe, build_model, load_recipe, recipe_path
from pipeline.run.step_memory import estimate
from tests.helpers.paper_table import PAPER, Row
from tests.models import nvae_restatement_layout as layout

REDUCED = (
    "model.encoder_channels=2",
    "model.decoder_channels=2",
    "model.latent_channels=2",
    "train.batch_size=2",
    "train.precision=fp32",
    "train.cpu_threads=1",
)
"""All groups, cells and flows of a recipe, narrow enough to train on a CPU."""


class Case(NamedTuple):
    name: str
    row: Row
    recipe: Recipe
    model: NVAE
    """On the meta device."""


@pytest.fixture(scope="module", params=PAPER)
def case(request) -> Case:
    recipe = load_recipe(recipe_path(request.param), [])
    with torch.device("meta"):
        return Case(request.param, PAPER[request.param], recipe, build_model(recipe))


def test_a_recipe_has_the_papers_settings(case):
    options, recipe = case.row.options, case.recipe
    config, image_shape, border, bits = ReleaseOptions(**options).network()
    assert recipe.model == config
    assert recipe.model.groups_per_scale == case.row.groups
    assert case.model.image_shape == image_shape
    assert (recipe.data.pad, recipe.data.bits) == (border, bits)
    assert recipe.data.flip == (options["dataset"] != "mnist")
    assert (recipe.train.epochs, recipe.train.batch_size) == (case.row.epochs, case.row.batch_size)
    assert not recipe.train.ema_decay
    check_objective(options, recipe)


def check_objective(options: Mapping, recipe: Recipe) -> None:
    regularizers, optim, objective = recipe.regularizers, recipe.optim, recipe.objective
    initial = options["weight_decay_norm_init"] if options["weight_decay_norm_anneal"] else None
    assert (regularizers.strength, regularizers.initial_strength) == (options["weight_decay_norm"], initial)
    assert (optim.lr, optim.lr_min) == (options["learning_rate"], options["learning_rate_min"])
    assert (optim.warmup_epochs, optim.weight_decay) == (options["warmup_epochs"], options["weight_decay"])
    assert (optim.name, optim.schedule, optim.eps, optim.clip) == ("adamax", "cosine", 1e-3, 0)
    assert objective.kl_warmup_portion == options["kl_anneal_portion"]
    assert objective.kl_warmup_delay == options["kl_const_portion"]
    assert objective.kl_warmup_floor == options["kl_const_coeff"]
    assert objective.kl_balancing == "square"


def test_its_model_is_that_of_the_release(case):
    """Names, order and shapes of all parameters as restated, and their number as measured."""
    names = layout.parameter_order(case.row.options)
    shapes = layout.parameter_shapes(case.row.options)
    parameters = list(case.model.parameters())
    assert reference_parameter_names(case.model) == names
    assert [tuple(parameter.shape) for parameter in parameters] == [shapes[name] for name in names]
    assert round(sum(parameter.numel() for parameter in parameters) / 1e6, 3) == case.row.millions
    assert len(parameters) == case.row.tensors
    assert len(case.model.groups) == sum(case.row.groups)
    assert [group.shape for group in case.model.groups] == layout.latent_shapes(case.row.options)
    assert tuple(case.model.start.shape) == case.row.start
    assert len(find_convs(case.model)) == case.row.convs
    norms = [name for name, _ in case.model.named_buffers() if name.endswith("running_mean")]
    assert len(norms) == case.row.batch_norms


def test_its_head_states_the_memory_that_a_step_is_estimated_to_take(case):
    head = recipe_path(case.name).read_text().partition("\nmodel:")[0]
    images, processes = case.row.images_per_gpu, case.row.nodes * case.row.gpus_per_node
    found = {}
    for what in ("none", "norms", "cells"):
        train_config = case.recipe.train.model_copy(update={"recompute": what})
        memory = estimate(case.recipe.model_copy(update={"train": train_config}), case.model)
        found[what] = round(memory.peak(images, processes) / 2**30)
    assert f"about {found['none']} GiB of a GPU at the paper's {images} images" in head
    if case.name != "nvae_mnist":
        assert f"{found['norms']} with train.recompute=norms, {found['cells']} with cells" in head


def test_the_papers_batch_on_each_gpu():
    assert {name: row.images_per_gpu for name, row in PAPER.items()} == IMAGES_PER_GPU


@pytest.mark.parametrize("name", ["nvae_imagenet32", "nvae_celebahq256", "nvae_ffhq256"])
def test_two_training_steps(make_runtime, name):
    """Of a copy that is 2 channels wide, with all groups, cells and flows; 256-pixel images are reduced to 64."""
    size = ("data.size=64",) if PAPER[name].options["dataset"] != "imagenet_32" else ()
    recipe = load_recipe(recipe_path(name), [*REDUCED, *size])
    trainer = new_trainer(recipe, make_runtime())
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    assert len(before) == PAPER[name].tensors
    batch = next(iter(trainer.data.batches(0)))
    levels = trainer.data.model_inputs(batch)[0] * (2 ** PAPER[name].options["num_x_bits"] - 1)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    # Annealed from 1 by a KL weight of 1e-4 at the start.
    strength = trainer.state.regularizers.strength(trainer.objective.warmup(0))
    assert strength == pytest.approx(PAPER[name].options["weight_decay_norm"] ** 1e-4, rel=1e-12)
    assert train(trainer, 2) == 0  # no step was skipped
    for (label, parameter), old in zip(trainer.model.named_parameters(), before, strict=True):
        assert parameter.isfinite().all(), label
        if isinstance(trainer.model.get_submodule(label.rpartition(".")[0]), nn.Conv2d) and label.endswith("weight"):
            assert not torch.equal(parameter, old), label  # the first step's learning rate is 0, the second's is not
