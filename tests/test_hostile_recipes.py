"""Recipes and overrides with arbitrary text: a recipe, or a ConfigError that names what is wrong.

`HOSTILE_EXAMPLES` sets how many texts each test tries.
"""

import contextlib
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import ConfigError, build, dump, flatten, load_yaml, overlay, parse_yaml
from pipeline.recipe import Recipe, load_recipe, recipe_path
from tests.helpers.hostile import VALUES, altered, dumps, flipped
from tests.helpers.recipes import tiny_settings

hostile = settings(
    max_examples=int(os.environ.get("HOSTILE_EXAMPLES", "40")),
    derandomize="HOSTILE_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TINY = tiny_settings("data/tiny")
TEXT = yaml.safe_dump(TINY, default_flow_style=None).encode()
YAML = st.one_of(
    flipped(TEXT),
    altered(TINY).map(lambda value: yaml.safe_dump(value).encode()),
    altered(TINY).map(dumps),
    VALUES.map(dumps),
    st.text(alphabet="{}[]:,&*!?|>-#'\"\n \t%@a1.", max_size=40).map(str.encode),
    st.sampled_from(
        [
            b"? [a]\n: b",
            b"? {a: b}\n: c",
            b"2001-13-45",
            b"<<: *a",
            b"=",
            b"!!binary x",
            b"9" * 5000,
            b"0x" + b"f" * 5000,
        ]
    ),
    st.sampled_from([b"2001-01-01: 1", b"!!set {a}", b"!!omap [a: 1]", b"1: {2: 3}", b"\xff", b"a: !!timestamp x"]),
)


@hostile
@given(text=YAML)
def test_a_recipe_file(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    try:
        recipe = load_recipe(path, [])
    except ConfigError as error:
        recipe, problem = None, str(error)
    if recipe is None:
        assert all(line.isprintable() and len(line) < 1000 for line in problem.split("\n"))
        assert "Input should" not in problem
    else:
        assert build(Recipe, parse_yaml(dump(recipe), "dumped")) == recipe


@hostile
@given(key=st.sampled_from(["optim.lr", "model.groups_per_scale", "model", "data.root", "x", "train.steps"]), text=YAML)
def test_an_override(key, text):
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        build(Recipe, overlay(TINY, [f"{key}={text.decode()}"]))


@pytest.mark.parametrize("name", ["nvae", "mlp_vae", "conv_vae", "resnet_vae", "attribute_vae"])
def test_a_size_or_depth_has_a_bound(name):
    """Absurd ones are refused before a model of that size is built."""
    recipe = load_recipe(recipe_path(name), []).model_dump(mode="json")
    values = {f"model.{key}": value for key, value in flatten(recipe["model"]).items()}
    values |= {key: recipe["data"][key.removeprefix("data.")] for key in ("data.size", "data.channels", "data.pad")}
    for key, value in values.items():
        if type(value) is int or (isinstance(value, list) and type(value[0]) is int):
            absurd = [2**31] * len(value) if isinstance(value, list) else 2**31
            with pytest.raises(ConfigError, match=key):
                build(Recipe, overlay(recipe, [f"{key}={absurd}"]))


def test_a_model_has_a_bound_of_cells():
    words = ["model.groups_per_scale=[100,100]", "model.num_encoder_cells=100", "model.num_decoder_cells=100"]
    with pytest.raises(ConfigError, match=r"model.groups_per_scale: 40,000 cells and flows in all; at most 5,000"):
        build(Recipe, overlay(TINY, [*words, "model.num_flows=0"]))


def test_a_recipe_file_has_a_size_limit(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(ConfigError, match="recipe.yaml: larger than 65536 bytes; not a recipe"):
        load_yaml(path)
