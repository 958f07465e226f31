"""Recipes: the shipped ones are valid, and checks of several sections name the setting to change."""

import json
import re
import shlex
from pathlib import Path

import pytest

from pipeline.config import ConfigError, build, dump, load_yaml, overlay, parse_yaml, sections_in, tag_of
from pipeline.data.loader import DataConfig
from pipeline.recipe import RECIPES, Recipe, load_recipe, recipe_path, settings_page, total_steps
from pipeline.run.resume import changed_settings
from shard_data.__main__ import build_parser
from shard_data.sources import SOURCES
from tests.helpers.paper_table import PAPER

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_the_documented_recipes_exist():
    assert set(SHIPPED) >= {"nvae", "nvae_mnist_small", *PAPER}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_a_whole_file(name):
    """No inheritance: each names its model, data and duration, and says in its head what it is."""
    path = recipe_path(name)
    recipe = load_recipe(path, [])
    assert path.read_text().startswith("# ")
    assert {"model", "data", "train", "optim", "validation", "samples", "checkpoint", "tracking"} <= set(
        load_yaml(path)
    )
    assert recipe.data.root
    assert recipe.data.source
    assert build(Recipe, parse_yaml(dump(recipe, defaults=False), name)) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_the_command_that_makes_the_data_of_a_recipe_is_one(name):
    data = build(DataConfig, load_yaml(recipe_path(name))["data"])
    arguments = build_parser().parse_args([*shlex.split(data.source), "--out", data.root])
    assert arguments.command in SOURCES
    if hasattr(arguments, "size"):  # the others do not resize
        assert arguments.size == data.size
    if arguments.command == "folder":  # else there is no split to validate on
        assert (arguments.val, arguments.test, arguments.no_classes) in ((3000, 0, True), (7000, 0, True))
        assert arguments.name in data.root


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.micro_batch=3"], "train.micro_batch: 3 does not divide train.batch_size=8; [1, 2, 4, 8] do"),
        (["train.steps=null"], "give one of train.steps and train.epochs"),
        (["data.size=18"], "16 or 20 would work"),
        (["data.channels=1"], "likelihood logistic_mixture needs 3 image channels"),
        (["train.precision=fp8"], "train.precision: 'fp8' is not allowed; choose from 'fp32', 'bf16' or 'fp64'"),
        (["tracking.wandb=of"], "tracking.wandb"),
        (["optim.clip=.inf"], "optim.clip: must be a finite number"),
        (["samples.temperatures=[.inf]"], "samples.temperatures.0: must be a finite number"),
        (["samples.temperatures=[-0.5]"], "samples.temperatures.0: must be at least 0"),
        (["train.collective_timeout=.inf"], "train.collective_timeout: must be a finite number"),
        (["train.epochs=.inf"], "train.epochs: must be a finite number"),
        ([f"train.seed={2**64}"], "train.seed: must be less than"),
        (["train.epochs=1e308"], "train.epochs: must be at most"),
        ([f"train.steps={10**24}"], "train.steps: must be at most"),
        (["train.progress_timeout=1e300"], "train.progress_timeout: must be at most"),
        (["train.cpu_threads=100000000"], "train.cpu_threads: must be at most 4096"),
        (["regularizers.strength=0", "regularizers.initial_strength=1"], "regularizers.initial_strength=1 is set, but"),
        ([f"model.groups_per_scale={[1] * 11}"], "model.groups_per_scale: must have at most 10 values (given: [1, "),
        (["model={name: vdvae, encoder_blocks: ''}"], "model.encoder_blocks: needs 1 or more characters (given: '')"),
        (["model.cells=mbconv_den", "model.decoder_channels=6"], "model.decoder_channels must be multiples of 8"),
        (["model.cells=mbconv_den", "model.encoder_channels=1"], "model.encoder_channels and model.decoder_channels"),
        (["lr=0.1"], "lr: unknown key; did you mean 'optim.lr'?"),
        (
            ["model.groups_per_scale=3"],
            "model.groups_per_scale: needs a list, for instance 'model.groups_per_scale=[6]'",
        ),
    ],
)
def test_a_wrong_combination_says_what_to_change(make_recipe, words, message):
    with pytest.raises(ConfigError) as error:
        make_recipe(*words)
    assert message in str(error.value)


def test_epochs_on_the_command_line_replace_steps(tmp_path):
    path = recipe_path("nvae_mnist_small")
    recipe: Recipe = load_recipe(path, ["train.epochs=1.5"])
    assert recipe.train.steps is None
    assert total_steps(recipe, 60_000) == round(1.5 * 60_000 / 64)
    assert load_recipe(recipe_path("nvae_mnist"), ["train.steps=7"]).train.epochs is None
    with pytest.raises(ConfigError, match="give one of"):
        load_recipe(path, ["train.epochs=1", "train.steps=2"])


@pytest.mark.parametrize("override", ["data.binarise=dynamic", "data.binarize=dynamic"])
def test_a_renamed_setting_keeps_its_former_name(settings, override):
    """In a recipe, over either name in a recipe, and in a checkpoint's settings."""
    for name in ("binarise", "binarize"):
        data = {**settings["data"], name: "none"}
        assert build(Recipe, settings | {"data": data | {name: "dynamic"}}).data.binarize == "dynamic"
        assert build(Recipe, overlay(settings | {"data": data}, [override])).data.binarize == "dynamic"
    present = build(Recipe, settings).model_dump(mode="json")
    former = present | {"data": {("binarise" if key == "binarize" else key): v for key, v in present["data"].items()}}
    assert changed_settings(former, present) == ([], [])


@pytest.mark.parametrize(
    ("text", "mode"), [("off", "off"), ("false", "off"), ("true", "cells"), ("cells", "cells"), ("whole", "whole")]
)
def test_compile_takes_its_former_values(settings, text, mode):
    """`off` is false in YAML; true and false were the values of earlier recipes and checkpoints."""
    former, present = (overlay(settings, [f"train.compile={value}"]) for value in (text, f"'{mode}'"))
    assert build(Recipe, former).train.compile == mode
    assert changed_settings(former, build(Recipe, present).model_dump(mode="json")) == ([], [])


def test_a_setting_given_by_both_names_is_refused(settings):
    data = settings["data"] | {"binarise": "none", "binarize": "dynamic"}
    with pytest.raises(ConfigError, match=r"data.binarise: the former name of data.binarize"):
        build(Recipe, settings | {"data": data})


def test_an_unknown_model_lists_the_known():
    with pytest.raises(ConfigError, match=r"there is no such recipe; did you mean nvae\? known: .*nvae_celeba64"):
        recipe_path("nvea")
    with pytest.raises(ConfigError, match="--config nvae: no such file; did you mean --model nvae"):
        load_recipe(Path("nvae"), [])
    with pytest.raises(ConfigError, match=r"no such recipe; a file is named with --config; known: "):
        recipe_path(str(RECIPES / "nvae.yaml"))


def test_the_page_of_settings_is_current_and_has_each_setting_once():
    page = settings_page()
    command = "python -m pipeline.recipe > docs/settings.md"
    assert (RECIPES.parents[1] / "docs" / "settings.md").read_text() == page, command
    settings = re.findall(r"^- `([\w.]+)`(?!: one of)", page, flags=re.MULTILINE)
    assert len(settings) == len(set(settings)) > 60
    assert not re.search(r"^ *- `[\w.]+` = [^:]*: *(\*|$)", page, flags=re.MULTILINE), "a setting without a meaning"
    assert all(f"\n## {name}\n" in page for name in re.findall(r"^- \[(\w+)\]", page, flags=re.MULTILINE))


def test_the_page_of_settings_has_the_default_and_meaning_for_each_model():
    """On one line, where models that share a name mean the same by it; else on a line of their own."""
    entries = dict(re.findall(r"^- `model\.(\w+)`(.*(?:\n  - .*)*)", settings_page(), flags=re.MULTILINE))
    count = 0
    for section in sections_in(Recipe.model_fields["model"].annotation):
        for name, field in section.model_fields.items():
            if name == "name" or sections_in(field.annotation):
                continue
            head, *nested = entries[name].splitlines()
            lines = [line for line in nested if f"`{tag_of(section)}` = " in line] if nested else [head]
            assert len(lines) == 1, (section, name)
            assert f"`{json.dumps(field.default)}`" in lines[0]
            assert f": {' '.join(field.description.split())}" in lines[0]
            setters = re.findall(r"\w+", " ".join(re.findall(r"\*Set by (.*)\.\*", lines[0]))) if nested else []
            models = {load_yaml(recipe_path(setter))["model"]["name"] for setter in setters}
            assert models <= set(re.findall(r"`(\w+)` = ", lines[0]))
            count += len(nested)
    assert count >= 12
