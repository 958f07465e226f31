"""Checkpoints of NVAE's reference release: read as a model, written from one, and nothing lost on the way."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import build
from pipeline.data.preprocess import to_model_input
from pipeline.inference.model_folder import ModelContent, write_model_folder
from pipeline.inference.nvlabs_export import write_release
from pipeline.inference.nvlabs_import import RECIPES, read_release, recipe_for
from pipeline.inference.readjust import Readjustment, readjusted_content
from pipeline.models.noise import draw_noise
from pipeline.models.nvae_conversion import state_dict_to_reference
from pipeline.models.nvae_options import ReleaseOptions
from pipeline.recipe import Recipe, build_model, load_recipe, recipe_path
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import Checkpoint, read_folder
from pipeline.training.state import optimizer_tensors
from tests.helpers import golden
from tests.helpers.golden import close, close_buffers
from tests.helpers.recipes import merged, tiny_settings
from tests.helpers.release_files import CELLS, TINY, release_content, release_state, write_release_file
from tests.helpers.trained_runs import make_run
from tests.models import nvae_restatement as restatement
from tests.models import nvae_restatement_layout as layout

COLOR = {"dataset": "cifar10", "num_groups_per_scale": 1, "ada_groups": False}
VARIANTS = {
    "mnist": {},
    "color": COLOR,
    "no flows, five bits": COLOR | {"num_nf": 0, "num_x_bits": 5},
    "normal decoder": COLOR | {"num_mixture_dec": 1},
    "no squeeze-excitation, absolute posterior": {"use_se": False, "res_dist": False},
    "one group": {"num_latent_scales": 1, "num_groups_per_scale": 1},
    "two blocks": {"num_preprocess_blocks": 2, "num_postprocess_blocks": 2, "num_latent_scales": 1},
    "other cells": COLOR | {"arch_instance": "mbconv_den", "num_channels_enc": 8, "num_channels_dec": 8},
}


def reference(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def as_folder(content: ModelContent, path: Path) -> Checkpoint:
    write_model_folder(path, content, "card")
    return read_folder(path)


def write_variant(path: Path, variant: str) -> dict:
    """Writes a file of the release, and returns its options."""
    content = release_content(**VARIANTS[variant])
    if content["args"].arch_instance != "res_mbconv":
        del content["arch_instance"]
    write_release_file(path, content)
    return vars(content["args"])


def same_tensors(one: dict, other: dict) -> bool:
    equal = (one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)
    return list(one) == list(other) and all(equal)


# ---- what the model gives


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_model_of_a_file_computes_what_the_release_does(variant, tmp_path):
    args = write_variant(tmp_path / "x.pt", variant)
    content = read_release(tmp_path / "x.pt")
    model = build_model(content.recipe)
    model.load_state_dict(content.weights)
    model.double().eval()
    x = torch.rand(2, *layout.image_shape(args), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.round() if args["dataset"] == "mnist" else (31 * x).round() / 31
    noise = draw_noise(model.groups, 1, "test", range(2), torch.device("cpu"), torch.float64)
    expected = restatement.forward(restatement.Net(args, golden.double(release_state(args)), False), x, noise)
    out = model(x, noise)
    close(-out.elbo, expected["nelbo"])
    close(out.kl.T, expected["kl_all"])


def release_goldens() -> list:
    folder = golden.golden_folder()
    if folder is None:
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason="NVAE_GOLDEN_DIR is not set"))]
    return sorted((folder / "release").glob("*.checkpoint"))


@pytest.mark.parametrize("path", release_goldens(), ids=lambda path: path and path.stem)
@torch.no_grad()
def test_files_written_by_the_release_both_ways(path, tmp_path):
    expected, original = golden.load(path.with_suffix(".expected.pt")), reference(path)
    folder = as_folder(read_release(path), tmp_path / "model")
    write_release(tmp_path / "again.pt", folder)
    written = reference(tmp_path / "again.pt")
    for content in (read_release(path), read_release(tmp_path / "again.pt")):
        model = build_model(content.recipe)
        model.load_state_dict(content.weights)
        out = model.double().eval()(reference_input(expected), golden.noise(expected))
        close(-out.log_px, expected["eval_eps"]["recon"])
        close(out.kl.T, expected["eval_eps"]["kl_all"])
        close(out.log_qz, expected["eval_eps"]["log_q"])
        close(out.log_pz, expected["eval_eps"]["log_p"])
        close(-out.elbo, expected["eval_eps"]["nelbo"])
    before, after = vars(original["args"]), vars(written["args"])
    assert {name for name in before if after[name] != before[name]} <= {"root", "save", "data"}
    assert all(written[name] == original[name] for name in ("epoch", "global_step", "arch_instance"))
    copies = [name for name in written["state_dict"] if name.endswith("weight_normalized")]
    kept = {name: written["state_dict"][name] for name in original["state_dict"]}
    assert same_tensors(dict(original["state_dict"]), kept)
    assert set(written["state_dict"]) == set(original["state_dict"]) | set(copies)


def reference_input(expected: dict) -> Tensor:
    pixels = expected["x_uint8"] * (255 if expected["args"]["dataset"] == "mnist" else 1)
    return to_model_input(pixels, expected["args"]["num_x_bits"], torch.float64)


# ---- there and back


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_the_identity(variant, tmp_path):
    args = write_variant(tmp_path / "x.pt", variant)
    first = as_folder(read_release(tmp_path / "x.pt"), tmp_path / "first")
    write_release(tmp_path / "y.pt", first)
    written = reference(tmp_path / "y.pt")
    expected = release_state(args)
    if variant == "one group":
        expected["prior_ftr0"].zero_()  # not used there
    assert same_tensors(expected, written["state_dict"])
    assert [name for name in args if vars(written["args"])[name] != args[name]] == ["root"]
    second = as_folder(read_release(tmp_path / "y.pt"), tmp_path / "second")
    assert second.sha256 == first.sha256
    assert second.facts["settings"] == first.facts["settings"]
    assert (second.step, second.facts["nvlabs"]["epoch"]) == (153, 4)


def test_a_file_of_an_early_release_has_the_options_of_its_time(tmp_path, caplog):
    content = release_content(num_groups_per_scale=3, ada_groups=False, num_mixture_dec=10, dataset="cifar10")
    full = read_release(write_release_file(tmp_path / "full.pt", content))
    for name in ("ada_groups", "min_groups_per_scale", "num_mixture_dec"):
        delattr(content["args"], name)
    state = content["state_dict"]
    content["state_dict"] = {name: state[name] for name in state if not name.endswith("weight_normalized")}
    old = read_release(write_release_file(tmp_path / "old.pt", content))
    assert old.recipe == full.recipe
    (named,) = caplog.messages
    assert named.endswith(": ada_groups=False, min_groups_per_scale=1, num_mixture_dec=10")
    assert same_tensors(dict(old.weights), dict(full.weights))
    assert old.recipe.model.groups_per_scale == (3, 3)


def test_the_recipe_trains_and_measures_as_the_options_say(tmp_path):
    content = read_release(write_release_file(tmp_path / "x.pt"))
    recipe, options = content.recipe, content.facts["nvlabs"]["options"]
    assert (recipe.data.size, recipe.data.channels, recipe.data.pad, recipe.data.binarize) == (28, 1, 2, "dynamic")
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.train.seed) == (80, 12, 5)
    assert (recipe.optim.lr, recipe.optim.schedule, recipe.optim.warmup_epochs) == (8e-3, "cosine_per_epoch", 3)
    assert (recipe.regularizers.strength, recipe.regularizers.initial_strength) == (0.1, 1.0)
    assert options["num_process_per_node"] == 8
    assert content.facts["source"]["kind"] == "nvlabs"
    color = read_release(write_release_file(tmp_path / "y.pt", release_content(dataset="celeba_64", num_x_bits=5)))
    assert (color.recipe.data.size, color.recipe.data.bits, color.recipe.validation.split) == (64, 5, "val")
    assert color.recipe.model.likelihood.bin_rule == "published"


COMMON = {
    "num_latent_per_group": 20,
    "num_cell_per_cond_enc": 2,
    "num_cell_per_cond_dec": 2,
    "num_mixture_dec": 10,
    "ada_groups": True,
    "weight_decay_norm_anneal": False,
    "learning_rate": 1e-2,
    "warmup_epochs": 5,
}
PAPER = {
    "mnist": COMMON
    | {"epochs": 400, "batch_size": 200, "num_process_per_node": 2, "num_channels_enc": 32, "num_channels_dec": 32}
    | {"num_latent_scales": 2, "num_groups_per_scale": 10, "num_nf": 0, "weight_decay_norm": 1e-2}
    | {"num_preprocess_blocks": 2, "num_postprocess_blocks": 2}
    | {"num_preprocess_cells": 3, "num_postprocess_cells": 3},
    "ffhq": COMMON
    | {"epochs": 200, "batch_size": 4, "num_proc_node": 3, "num_channels_enc": 30, "num_channels_dec": 30}
    | {"num_latent_scales": 5, "num_groups_per_scale": 16, "min_groups_per_scale": 4, "num_nf": 2, "num_x_bits": 5}
    | {"weight_decay_norm": 1e-1, "weight_decay_norm_anneal": True, "learning_rate": 8e-3}
    | {"num_preprocess_cells": 2, "num_postprocess_cells": 2},
}
"""The options of the release for two of its models."""


@pytest.mark.parametrize("dataset", PAPER)
def test_the_options_of_a_published_model_make_its_recipe(dataset):
    """Except for the precision, and for the learning rate, which follows epochs in the release."""
    expected = load_recipe(recipe_path(RECIPES[dataset]), [])
    found = recipe_for(ReleaseOptions(**TINY | PAPER[dataset] | {"dataset": dataset}))
    for section in ("model", "data", "validation", "objective", "regularizers"):
        assert getattr(found, section) == getattr(expected, section)
    assert (found.train.epochs, found.train.batch_size) == (expected.train.epochs, expected.train.batch_size)
    assert found.optim.model_copy(update={"schedule": "cosine"}) == expected.optim


# ---- files that cannot be used


def without(name: str) -> dict:
    content = release_content()
    del content[name]
    return content


def with_state(**changes: object) -> dict:
    content = release_content()
    content["state_dict"].update({name.replace("__", "."): value for name, value in changes.items()})
    return content


def without_option(name: str) -> dict:
    content = release_content()
    delattr(content["args"], name)
    return content


def with_options(changes: dict) -> dict:
    """Weights of the tiny model with other options than its own."""
    return release_content() | {"args": argparse.Namespace(**TINY | changes)}


def of_one_storage() -> dict:
    """All tensors are views of the largest one, which the file holds once."""
    content = release_content(num_channels_enc=32, num_channels_dec=32)
    state, shapes = content["state_dict"], layout.parameter_shapes(vars(content["args"]))
    largest = torch.zeros(max(tensor.numel() for tensor in state.values()))
    for name, shape in shapes.items():
        if state[name].is_floating_point():
            state[name] = largest[: torch.Size(shape).numel()].view(shape)
    return content


STEM = torch.zeros(4, 1, 3, 3)
UNUSABLE = {
    "list": (lambda: [1, 2], "holds a list"),
    "state dict": (lambda: dict(release_content()["state_dict"]), "it has no state_dict and no args"),
    "no options": (lambda: without("args"), "it has no args"),
    "no weights": (lambda: without("state_dict"), "it has no state_dict"),
    "options of another kind": (lambda: release_content() | {"args": TINY}, "args no argparse.Namespace"),
    "other keys": (lambda: with_state(extra__weight=STEM), "'extra.weight' is unknown"),
    "missing key": (lambda: release_content() | {"state_dict": {}}, "'prior_ftr0' is missing"),
    "other shape": (lambda: with_state(stem__weight=STEM[:2]), "'stem.weight' has shape (2, 1, 3, 3)"),
    "other precision": (lambda: with_state(stem__weight=STEM.long()), "'stem.weight' has dtype int64"),
    "not finite": (lambda: with_state(stem__weight=STEM * torch.inf), "'stem.weight' has non-finite values"),
    "expanded": (
        lambda: with_state(stem__weight=torch.zeros(1).expand(2**40)),
        "'stem.weight' has more elements than the file",
    ),
    "one storage": (of_one_storage, "its tensors together have more elements than the file holds"),
    "no tensor": (lambda: with_state(stem__weight=[1.0]), "'stem.weight' is not a tensor"),
    "missing option": (lambda: without_option("res_dist"), "res_dist: is required"),
    "no number of bits": (lambda: without_option("num_x_bits"), "num_x_bits: is required"),
    "an option as text": (lambda: with_options({"num_nf": "1"}), "num_nf"),
    "option of another kind": (lambda: release_content(seed=[5]), "option seed is a list"),
    "large option": (lambda: with_options({"num_channels_enc": 2**60}), "num_channels_enc: must be at most"),
    "absurd size": (lambda: with_options({"num_channels_enc": 2**16}), "'stem.weight' has shape"),
    "too deep": (
        lambda: with_options({"num_preprocess_blocks": 100, "num_postprocess_blocks": 100}),
        "image size 32",
    ),
    "unknown cells": (lambda: with_options({"arch_instance": "res_elu"}), "'res_elu' is not supported"),
    "other operations": (
        lambda: release_content() | {"arch_instance": CELLS | {"up_dec": ["mconv_e6k7g0"]}},
        "its cells up_dec are made of ['mconv_e6k7g0']",
    ),
    "negative step": (lambda: release_content() | {"global_step": -1}, "global_step is -1"),
    "learning rates": (lambda: release_content(learning_rate_min=1.0), "optim.lr_min=1.0 is above"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(case, tmp_path):
    make, message = UNUSABLE[case]
    path = tmp_path / "x.pt"
    torch.save(make(), path)
    with pytest.raises(ValueError) as caught:
        read_release(path)
    text = str(caught.value)
    assert message in text
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    assert len(text) < 2200


def test_what_the_release_does_not_have_is_named(tmp_path, caplog):
    content = release_content(my_own_option=1) | {"ema": {}}
    read_release(write_release_file(tmp_path / "x.pt", content))
    named = [line.rpartition(": ")[2] for line in caplog.messages if "the release does not have them" in line]
    assert named == ["['ema']", "['my_own_option']"]


# ---- from runs of ours


def run_settings(**sections: dict) -> dict:
    settings = merged(tiny_settings("data"), {"data": {"size": 32, "bits": 8}, "train": {"ema_decay": 0.0}})
    return merged(settings, sections)


@pytest.mark.parametrize("groups", [[1, 2], [1]])
def test_a_run_becomes_a_file_with_the_state_of_its_optimizer(groups, tmp_path):
    recipe = build(Recipe, run_settings(optim={"lr": 3e-3}, model={"groups_per_scale": groups}))
    torch.manual_seed(0)
    model = build_model(recipe)
    adamax = torch.optim.Adamax(model.parameters(), lr=3e-3, eps=1e-3, weight_decay=3e-4)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        adamax.step()
    tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, adamax)}
    Checkpoints(tmp_path / "run").save(20, tensors, {"settings": recipe.model_dump(mode="json")})
    checkpoint = read_folder(tmp_path / "run" / "step_00000020")
    write_release(tmp_path / "x.pt", checkpoint)
    written = reference(tmp_path / "x.pt")
    checkpoint.facts["settings"]["optim"]["gradient_unit"] = "nats_per_dimension"  # the release's moments have another
    assert written["optimizer"]["state"]
    write_release(tmp_path / "y.pt", checkpoint)
    assert not reference(tmp_path / "y.pt")["optimizer"]["state"]

    names = layout.parameter_order(vars(written["args"]))
    theirs = {name: torch.nn.Parameter(written["state_dict"][name].clone()) for name in names}
    again = torch.optim.Adamax(theirs.values())
    again.load_state_dict(written["optimizer"])  # as the release would, in its own order of parameters
    used = [their for name, their in theirs.items() if name != "prior_ftr0" or len(groups) > 1]
    for parameter in (*model.parameters(), *used):
        parameter.grad = torch.ones_like(parameter)
    adamax.step()
    again.step()
    assert all(torch.equal(ours, their) for ours, their in zip(model.parameters(), used, strict=True))
    found = read_release(tmp_path / "x.pt")
    assert found.step == 20
    assert (found.recipe.optim.lr, found.recipe.train.batch_size) == (3e-3, recipe.train.batch_size)
    assert found.recipe.model == recipe.model


@pytest.mark.parametrize("kept", ["average", "last"])
def test_a_run_with_a_moving_average_needs_a_choice(kept, tmp_path):
    make_run(tmp_path / "run", run_settings(train={"ema_decay": 0.9}))
    checkpoint = read_folder(tmp_path / "run" / "checkpoints" / "step_00000007")
    with pytest.raises(ValueError, match=r"train.ema_decay.*--weights average or --weights last"):
        write_release(tmp_path / "x.pt", checkpoint)
    write_release(tmp_path / "x.pt", checkpoint, kept)
    stem = {"average": "ema", "last": "model"}[kept]
    expected, found = state_dict_to_reference(checkpoint.tensors[stem]), reference(tmp_path / "x.pt")["state_dict"]
    assert same_tensors({name: expected[name] for name in found}, found)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"size": 16}}, "images of 16x16"),
        ({"train": {"precision": "fp64"}}, "train.precision=fp64"),
        ({"condition": {"name": "class", "num_classes": 3}}, "condition.name=class"),
        ({"model": {"likelihood": {"name": "normal", "sigma": 0.5}}}, "model.likelihood"),
        (
            {"model": {"likelihood": {"name": "logistic_mixture", "num_components": 2, "bin_rule": "exact"}}},
            "model.likelihood",
        ),
        ({"model": {"groups_per_scale": [1, 5]}}, "model.groups_per_scale"),
        ({"model": {"groups_per_scale": [1], "decoder_channels": 8}}, "model.decoder_channels=8: the release"),
        ({"train": {"batch_size": 2**21}}, r"batch_size: must be at most 1048576 \(given: 2097152\)$"),
        ({"data": {"pad": 2, "size": 28}}, "data.pad"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused_by_name(sections, message, tmp_path):
    make_run(tmp_path / "run", run_settings(**sections))
    with pytest.raises(ValueError, match=f"cannot be written in the release's format: .*{message}"):
        write_release(tmp_path / "x.pt", read_folder(tmp_path / "run" / "checkpoints" / "step_00000007"))
    assert os.listdir(tmp_path) == ["run"]


def test_another_model_is_refused_by_name(tmp_path):
    settings = run_settings() | {"model": {"name": "mlp_vae", "hidden": 8, "latent_size": 2}}
    make_run(tmp_path / "run", settings | {"regularizers": {"strength": 0}})
    with pytest.raises(ValueError, match="model.name=mlp_vae; it has only NVAE"):
        write_release(tmp_path / "x.pt", read_folder(tmp_path / "run" / "checkpoints" / "step_00000007"))


def test_a_choice_of_weights_that_are_not_there_is_refused(tmp_path):
    make_run(tmp_path / "run", run_settings())
    with pytest.raises(ValueError, match="--weights average: it holds the last weights only"):
        write_release(
            tmp_path / "x.pt", read_folder(tmp_path / "run" / "checkpoints" / "step_00000007"), weights="average"
        )


# ---- batch norm for a temperature


@torch.no_grad()
def test_saved_statistics_are_those_of_the_release_s_own_estimate(tmp_path):
    content = read_release(write_release_file(tmp_path / "x.pt"))
    found = readjusted_content(content, Readjustment(3, 0.6, batch_size=4, seed=9))
    net = restatement.Net(TINY, golden.double(release_state(TINY)), True)
    groups = build_model(content.recipe).groups
    for iteration in range(3):
        positions = range(4 * iteration, 4 * iteration + 4)
        noise = draw_noise(groups, 9, "readjust", positions, torch.device("cpu"), torch.float32)
        restatement.sample_logits(net, [eps.double() for eps in noise], 0.6)
    exported = state_dict_to_reference(found.weights)
    expected = {name: tensor for name, tensor in net.state.items() if "running" in name or "batches" in name}
    close_buffers(golden.double(exported), expected | net.running, slack=1e-5)
    assert found.facts["readjusted"] == {"iterations": 3, "temperature": 0.6, "batch_size": 4, "seed": 9}
    moved = {name for name in content.weights if not torch.equal(content.weights[name], found.weights[name])}
    assert moved
    assert all(name.startswith(("decoder.", "postprocess.")) for name in moved)
    with pytest.raises(ValueError, match="was re-estimated already"):
        readjusted_content(found, Readjustment(1, 0.6))
