"""The estimate of a step's memory."""

import re

import pytest
import torch
from torch import nn

from benchmarks.counts import IMAGES_PER_GPU, count_step, read_recipe
from pipeline.recipe import load_recipe, recipe_path
from pipeline.run.dry_run import describe_memory
from pipeline.run.step_memory import StepMemory, count_saved, counted_figures, estimate, key_of, meta_model
from tests.helpers.vdvae_table import VDVAE


@pytest.mark.parametrize("name", IMAGES_PER_GPU)
def test_the_papers_recipes_have_figures(name):
    """Counted for the present architecture, with each kind of recomputation; else:
    python -m benchmarks.step_memory.
    """
    recipe = load_recipe(recipe_path(name), [])
    model, found = meta_model(recipe), []
    for what in ("none", "norms", "cells"):
        train = recipe.train.model_copy(update={"recompute": what})
        found.append(counted_figures()[key_of(recipe.model_copy(update={"train": train}), model)])
    assert [one["recompute"] for one in found] == ["none", "norms", "cells"]
    assert {one["recipe"] for one in found} == {name.replace("ffhq", "celebahq")}  # a model for both
    assert found[0]["per_image"] > found[1]["per_image"] > found[2]["per_image"]


@pytest.mark.parametrize("name", VDVAE)
def test_vdvae_s_recipes_have_figures(name):
    """It has no norms to recompute."""
    recipe = load_recipe(recipe_path(name), [])
    model, found = meta_model(recipe), []
    for what in ("none", "cells"):
        train = recipe.train.model_copy(update={"recompute": what})
        found.append(counted_figures()[key_of(recipe.model_copy(update={"train": train}), model)])
    assert [(one["recipe"], one["recompute"], one["precision"]) for one in found] == [
        (name, "none", "fp32"),
        (name, "cells", "fp32"),
    ]
    assert found[0]["per_image"] > 2 * found[1]["per_image"]


def test_figures_are_of_one_architecture():
    recipe = load_recipe(recipe_path("nvae_mnist"), ["model.num_encoder_cells=3"])
    assert key_of(recipe, meta_model(recipe)) not in counted_figures()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "recompute"), [("fp32", "none"), ("bf16", "none"), ("fp32", "cells")])
def test_a_small_model_is_estimated_by_a_forward_pass(make_recipe, precision, recompute):
    """Against the memory that is alive in a whole step, counted operator by operator."""
    changes = ("model.encoder_channels=16", "model.decoder_channels=16", "train.batch_size=32")
    recipe = make_recipe(f"train.precision={precision}", f"train.recompute={recompute}", *changes)
    found = estimate(recipe)
    assert found.peak(32) - found.state == pytest.approx(count_step(recipe, 1).memory.peak, rel=0.3)


class Scaled(nn.Module):
    """relu(x @ exp(weight)^T) with 5 columns of x and 4 of the result."""

    image_shape, noise_groups, condition_size = (5, 1, 1), (), 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 5))

    def forward(self, x, noise, condition):
        return torch.relu(x.flatten(1) @ self.weight.exp().t())


def test_what_is_saved_once_and_for_each_image():
    with torch.device("meta"):
        model = Scaled()
    # The exponential of 20 numbers is saved once; x and the result for each image. The parameter itself is no copy.
    assert count_saved(model, scale=1) == (4 * 20, 4 * (5 + 4))
    assert count_saved(model, scale=0.5) == (2 * 20, 2 * (5 + 4))


class Waves(nn.Module):
    """Saves five numbers for each image and wave."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, x):
        for _ in range(self.count):
            x = x.exp() * 2  # saves the exponential
        return x


class Chain(nn.Module):
    image_shape, noise_groups, condition_size = (5, 1, 1), (), 0

    def __init__(self):
        super().__init__()
        self.weight, self.cells = nn.Parameter(torch.empty(5)), nn.ModuleList([Waves(3), Waves(4)])

    def forward(self, x, noise, condition):
        x = x.flatten(1) * self.weight  # saves x
        for cell in self.cells:
            x = cell(x)
        return x.sin()  # saves the cells' result


def test_of_what_is_recomputed_the_inputs_and_the_largest_part_count():
    with torch.device("meta"):
        model = Chain()
    assert count_saved(model, scale=1) == (0, 4 * 5 * (1 + 3 + 4 + 1))
    cells = [(cell, "forward") for cell in model.cells]
    for _ in range(2):  # the model is not changed
        assert count_saved(model, 1, cells) == (0, 4 * 5 * (1 + 2 + 4 + 1))
    assert count_saved(model, scale=1) == (0, 4 * 5 * (1 + 3 + 4 + 1))


def test_several_processes_keep_the_gradients_in_buckets(make_recipe):
    recipe = make_recipe()
    weights = 4 * sum(parameter.numel() for parameter in meta_model(recipe).parameters())
    found = estimate(recipe)
    assert found.state == 4 * weights  # two moments and the moving average
    assert found.peak(1, processes=2) == found.peak(1) + weights
    accumulating = estimate(make_recipe("train.micro_batch=4"))  # gradients take the same outside of buckets
    assert accumulating.peak(1) == accumulating.peak(1, processes=2) == found.peak(1, processes=2)


def test_gradients_that_accumulate_are_there_during_every_pass():
    found = StepMemory(state=1000, gradients=500, fixed=4, per_image=300)
    assert (found.peak(2), found.peak(2, processes=2)) == (1604, 2104)
    assert found.peak(1) == 1500  # one image takes less than the gradients at the end
    accumulating = found._replace(accumulates=True)
    assert accumulating.peak(2) == accumulating.peak(2, processes=2) == 2104  # in DDP's buckets, not beside them


@pytest.mark.slow
def test_vdvae_has_no_gradients_at_its_peak_unless_they_accumulate():
    """Counted operator by operator: without them, images alone make the peak."""

    def count(images: int, micro_batch: int) -> int:
        words = ["train.precision=fp32", f"train.batch_size={images}", f"train.micro_batch={micro_batch}"]
        return count_step(read_recipe("vdvae_mnist_small", 1, words), 1).memory.peak

    one_pass, half = count(8, 8), count(4, 4)
    recipe = load_recipe(recipe_path("vdvae_mnist_small"), [])
    gradients = 4 * sum(parameter.numel() for parameter in meta_model(recipe).parameters())
    assert 2 * half - one_pass < 1000
    found = StepMemory(0, gradients, 2 * half - one_pass, (one_pass - half) // 4, accumulates=True)
    assert found.peak(4) == pytest.approx(count(8, 4), rel=1e-3)


def test_a_dry_run_says_whether_there_are_gradients_at_the_peak():
    recipe = load_recipe(recipe_path("vdvae_cifar10"), [])
    model = meta_model(recipe)
    halves = load_recipe(recipe_path("vdvae_cifar10"), ["train.micro_batch=16"])
    whole, half = (describe_memory(one, model, 1)[1] for one in (recipe, halves))
    assert re.search(r"moving average [\d.]+ MiB, no gradients at that moment, and 633\.0 MiB for each image", whole)
    assert re.search(r"gradients and temporary weights 149\.3 MiB, and 633\.0 MiB for each image", half)
    recipe = load_recipe(recipe_path("nvae_mnist"), [])  # its peak is at the end of the forward pass too
    assert "moving average" not in (line := describe_memory(recipe, meta_model(recipe), 1)[1])
    assert re.search(r"optimizer [\d.]+ MiB, temporary weights 442\.6 MiB, and", line)


def test_a_dry_run_states_the_peak_by_the_number_of_processes(make_recipe, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = make_recipe("train.micro_batch=4")
    lines = describe_memory(recipe, meta_model(recipe), 1)
    assert "estimated" in lines[1]
    assert [line.split("on each GPU with ")[1] for line in lines[2:]] == [
        "1 process, 4 images each",
        "2 processes, 2 images each",
        "4 processes, 1 image each",
    ]
    recomputing = make_recipe("train.micro_batch=4", "train.recompute=cells")  # a model that can be changed once only
    assert len(describe_memory(recomputing, meta_model(recomputing), 1)) == len(lines)
    many = describe_memory(make_recipe("train.batch_size=96"), meta_model(recipe), 1)[2:]
    assert [line.split(" with ")[1].split()[0] for line in many] == ["1", "2", "4", "8", "24"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(describe_memory(recipe, meta_model(recipe), 1)) == 3
    assert "auto" in describe_memory(make_recipe("train.micro_batch=auto"), meta_model(recipe), 1)[-1]
