"""Overrides and YAML become a strict, frozen config; every error names the dotted path and what to write instead."""

import time
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from pipeline.config import ConfigError, build, dump, flatten, load_yaml, overlay, parse_override, parse_yaml
from pipeline.schema import Section


class Flat(Section):
    name: Literal["flat"] = "flat"
    width: int = 3


class Deep(Section):
    name: Literal["deep"] = "deep"
    depth: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, strict=False)] = (1,)


class Train(Section):
    batch_size: int = Field(8, gt=0)
    lr: float = 1e-3
    root: str | None = None
    share: int | float = 0
    mode: Literal["fast", "slow"] = "fast"


class Root(Section):
    model: Annotated[Flat | Deep, Field(discriminator="name")] = Flat()
    train: Train = Train()


def built(*overrides: str) -> Root:
    return build(Root, overlay({"model": {"name": "flat"}}, overrides))


def test_overrides_replace_values_of_the_recipe():
    root = built(
        "train.batch_size=64", "--train.lr=5e-3", "model.name=deep", "model.depth=[5, 10, 20]", "train.root=data/x"
    )
    assert root == Root(model=Deep(depth=(5, 10, 20)), train=Train(batch_size=64, lr=0.005, root="data/x"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=64", "train.batchsize: unknown key; did you mean 'batch_size'?"),
        ("trian.batch_size=64", "trian: unknown key; did you mean 'train'?"),
        ("model.widht=64", "model.widht: unknown key; did you mean 'width'?"),
        ("train.zzz=1", "train.zzz: unknown key; known keys: batch_size, lr, root, share, mode"),
        (
            "train.batch_size=many",
            "train.batch_size: needs a whole number, for instance train.batch_size=8 (given: 'many')",
        ),
        (
            "train.batch_size='8'",
            "train.batch_size: needs a whole number, for instance train.batch_size=8 (given: '8')",
        ),
        ("train.batch_size=0", "train.batch_size: must be greater than 0 (given: 0)"),
        ("train.mode=wild", "train.mode: 'wild' is not allowed; choose from 'fast' or 'slow'"),
        ("model.name=round", "model.name: 'round' is not allowed; choose from 'flat', 'deep'"),
        ("model.name=flt", "model.name: 'flt' is not allowed; did you mean 'flat'? choose from 'flat', 'deep'"),
        ("model=flat", "model: needs a section of settings, for instance 'model={name: flat}' (given: 'flat')"),
        ("model={width: 3}", "model: needs a name, one of flat, deep, for instance model.name=flat"),
        ("train=3", "train: needs a section of settings (given: 3)"),
        ("train.root=2024", """train.root: needs text, for instance 'train.root="2024"' (given: 2024)"""),
        ("train.lr=fast", "train.lr: needs a number, for instance train.lr=0.001 (given: 'fast')"),
        ("train.share=x", "train.share: needs a number, for instance train.share=0 (given: 'x')"),
        ("train.LR=1", "train.LR: unknown key; did you mean 'lr'?"),
        ("model.depth=[1]", "model.depth: unknown key"),
        ("train.batch_size.x=3", "train.batch_size: needs a whole number"),
        ("train", "settings are given as section.key=value"),
        ("train.lr={", "train.lr: not valid YAML"),
        ("lr=0.1", "lr: unknown key; did you mean 'train.lr'?"),
        ("train.lr=.inf", "train.lr: must be a finite number"),
        ("train.lr=.nan", "train.lr: must be a finite number"),
        ("train.batch_size=1_0:30", "1_0:30 is a number to base 60"),
        ("train.lr=1:30.5", "1:30.5 is a number to base 60"),
    ],
)
def test_errors_name_the_path_and_the_fix(override, message):
    with pytest.raises(ConfigError) as error:
        built(override)
    assert message in str(error.value)


def test_a_list_that_is_missing_is_explained_by_an_example():
    with pytest.raises(ConfigError, match=r"model.depth: needs a list, for instance 'model.depth=\[1\]' \(given: 5\)"):
        built("model.name=deep", "model.depth=5")


def test_an_invalid_element_is_reported_once():
    """pydantic drops invalid elements, and then finds the list too short."""
    with pytest.raises(ConfigError) as error:
        built("model.name=deep", "model.depth=[0]")
    assert str(error.value) == "model.depth.0: must be at least 1 (given: 0)"
    with pytest.raises(ConfigError, match="model.depth: needs 1 or more values"):
        built("model.name=deep", "model.depth=[]")


@pytest.mark.parametrize("text", ["2026-11-25", "12:30:15 h", "=", "<<"])
def test_text_that_older_yaml_gives_a_meaning_is_text(text):
    assert parse_yaml(text, "x") == text


@pytest.mark.parametrize(("text", "value"), [("0100", 100), ("-010", -10), ("0x10", 16), ("1_000", 1000)])
def test_a_leading_zero_does_not_make_a_number_octal(text, value):
    assert parse_yaml(text, "x") == value


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]),
        "a: &a [*a]",
        "a: " + "[" * 5000,
        "a: " + "- " * 5000,
    ],
    ids=["nested aliases", "an alias in itself", "nesting", "nested lines"],
)
def test_a_yaml_bomb_is_refused_quickly(text):
    start = time.process_time()
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml(text, "recipe")
    assert time.process_time() - start < 1


def test_an_alias_may_stand_for_a_value():
    assert parse_yaml("a: &a [1, 2]\nb: *a", "x") == {"a": [1, 2], "b": [1, 2]}


def test_a_value_is_no_section():
    with pytest.raises(ConfigError, match=r"train.lr: holds a value, so 'train.lr.x' cannot be set inside it"):
        build(Root, overlay({"train": {"lr": 1.0}}, ["train.lr.x=1"]))


def test_a_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        built().train.batch_size = 3


@pytest.mark.parametrize(
    ("text", "value"), [("5e-3", 0.005), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1e", "1e"), ("7", 7), ("none", "none")]
)
def test_numbers_are_read_as_people_write_them(text, value):
    assert parse_yaml(text, "x") == value
    assert type(parse_yaml(text, "x")) is type(value)


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {lr: 1.0}\nmodel: {}\ntrain: {lr: 2.0}\n")
    with pytest.raises(ConfigError, match="key 'train' is given twice"):
        load_yaml(path)


@pytest.mark.parametrize("text", ["1: 2", "on: 2", "null: 2", "0.5: {1: 2}"])
def test_keys_are_text(text):
    with pytest.raises(ConfigError, match="is used as a name; names are text"):
        parse_yaml(text, "recipe")


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "a: !!python/tuple [1]"]
)
def test_yaml_cannot_make_objects(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(path)


def test_a_recipe_must_be_there_and_be_a_mapping(tmp_path):
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_yaml(tmp_path / "missing.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="folder.yaml: not a regular file$"):
        load_yaml(tmp_path / "folder.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="lists.yaml: no such recipe file; did you mean '.*list.yaml'"):
        load_yaml(tmp_path / "lists.yaml")
    with pytest.raises(ConfigError, match="list.yaml: not a recipe: it holds no sections"):
        load_yaml(tmp_path / "list.yaml")


sections = st.builds(
    Root,
    model=st.one_of(
        st.builds(Flat, width=st.integers()),
        st.builds(Deep, depth=st.lists(st.integers(1), min_size=1, max_size=4).map(tuple)),
    ),
    train=st.builds(
        Train,
        batch_size=st.integers(1, 10**9),
        lr=st.floats(allow_nan=False, allow_infinity=False),
        root=st.none() | st.text(max_size=20).filter(str.isprintable),
    ),
)


@given(sections)
def test_dump_reads_back_to_the_same(section):
    for defaults in (True, False):
        assert build(Root, parse_yaml(dump(section, defaults), "dumped")) == section


def test_a_dump_without_defaults_has_what_differs_and_the_names_of_kinds():
    assert dump(built(), defaults=False) == "{}\n"
    assert (
        dump(built("model.width=4", "train.root=x"), defaults=False)
        == "model: {name: flat, width: 4}\ntrain: {root: x}\n"
    )
    assert dump(built("model.name=deep"), defaults=False) == "model: {name: deep}\n"


@given(st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8}){0,3}", fullmatch=True), st.integers())
def test_an_override_is_a_path_and_a_value(path, value):
    assert parse_override(f"{path}={value}") == (path.split("."), value)
    assert flatten(overlay({}, [f"{path}={value}"])) == {path: value}
