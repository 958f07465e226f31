"""The shipped recipes of VDVAE against the options of the release, whose names are in vdvae_units.pt."""

import hashlib

import pytest
import torch

from benchmarks.steps import VDVAE_IMAGES_PER_GPU
from pipeline.models.vdvae_conversion import config_from_reference, keys_to_reference
from pipeline.recipe import Recipe, build_model, load_recipe, recipe_path
from tests.helpers import golden
from tests.helpers.vdvae_table import VDVAE

each_recipe = pytest.mark.parametrize("name", VDVAE)


@pytest.fixture(scope="module")
def published() -> dict:
    if golden.golden_folder() is None:
        pytest.skip("NVAE_GOLDEN_DIR is not set")
    return golden.load(golden.golden_folder() / "vdvae" / "vdvae_units.pt")["published"]


def shipped(name: str, *overrides: str) -> Recipe:
    return load_recipe(recipe_path(name), list(overrides))


@each_recipe
def test_the_tensors_are_the_release_s_by_name_and_shape(name, published):
    expected = published[VDVAE[name].units]
    with torch.device("meta"):
        model = build_model(shipped(name))
    state = model.state_dict()
    names = keys_to_reference(state)
    lines = "\n".join(f"{names[ours]} {tuple(tensor.shape)}" for ours, tensor in state.items())
    assert hashlib.sha256(lines.encode()).hexdigest() == expected["names_sha256"]
    numbers = sum(tensor.numel() for tensor in state.values())
    dimensions = sum(torch.Size(group.shape).numel() for group in model.groups)
    assert (numbers, len(state), dimensions) == (
        expected["n_params"],
        expected["n_tensors"],
        expected["latent_dims"],
    )
    head = recipe_path(name).read_text().partition("\nmodel:")[0]
    assert f"{numbers:,} parameters" in head
    assert f"{dimensions:,}" in head


@each_recipe
def test_the_model_is_the_release_s(name, published):
    """With 5 bits, by the release's rule if the two overrides of the head are given."""
    overrides = [
        line[4:].split() for line in recipe_path(name).read_text().splitlines() if line.startswith("#   data.")
    ]
    assert len(overrides) == (name == "vdvae_ffhq256")
    recipe = shipped(name, *sum(overrides, []))
    assert recipe.model == config_from_reference(published[VDVAE[name].units]["args"])
    assert recipe.data.bits == 8


def test_five_bits_have_bins_that_do_not_overlap():
    recipe = shipped("vdvae_ffhq256")
    assert (recipe.data.bits, recipe.model.likelihood.bin_rule) == (5, "exact")


@each_recipe
def test_the_training_rules_are_the_release_s(name, published):
    recipe, args = shipped(name), published[VDVAE[name].units]["args"]
    optim, train = recipe.optim, recipe.train
    assert (optim.name, optim.lr, optim.weight_decay) == ("adamw", args["lr"], args["wd"])
    assert (optim.beta1, optim.beta2, optim.eps) == (args["adam_beta1"], args["adam_beta2"], 1e-8)
    assert (optim.schedule, optim.warmup_steps, optim.warmup_from_zero) == ("constant", args["warmup_iters"], True)
    assert (optim.clip, optim.skip_threshold) == (args["grad_clip"], args["skip_threshold"])
    assert optim.gradient_unit == "nats_per_dimension"
    assert (train.ema_decay, train.ema_warmup) == (args["ema_rate"], False)
    assert recipe.objective.schedule == "constant"
    assert (recipe.objective.beta, recipe.objective.kl_balancing, recipe.objective.free_bits) == (1, "none", 0)
    assert not recipe.data.flip
    row = VDVAE[name]
    assert (train.steps, train.batch_size, train.precision) == (row.steps, row.batch_size, "fp32")
    assert row.images_per_gpu == args["n_batch"] == VDVAE_IMAGES_PER_GPU[name]


def test_cifar10_is_trained_on_45000_images():
    recipe = shipped("vdvae_cifar10")
    assert (recipe.data.holdout, recipe.validation.split) == (5_000, "val")
