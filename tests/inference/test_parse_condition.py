"""Conditions as users write them: classes by number or name, attributes by name."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pipeline
from pipeline.inference.parse_condition import parse_classes, parse_settings, to_condition
from pipeline.models.conditions import AttributeCondition, ClassCondition
from tests.helpers.recipes import tiny_settings
from tests.helpers.trained_runs import make_run

NAMES = ("Black_Hair", "Blond_Hair", "Smiling")
BY_CLASS = {"name": "class", "num_classes": 3}
ATTRIBUTES = {"name": "attributes", "chosen": list(NAMES), "exclusive": [["Black_Hair", "Blond_Hair"]]}


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    path = make_run(
        tmp_path_factory.mktemp("classes"),
        tiny_settings("nowhere") | {"condition": BY_CLASS},
        ["cat", "dog", "7"],
    )
    return pipeline.load(path)


@pytest.fixture(scope="module")
def by_attributes(tmp_path_factory):
    return pipeline.load(
        make_run(tmp_path_factory.mktemp("attributes"), tiny_settings("nowhere") | {"condition": ATTRIBUTES})
    )


def test_a_class_by_number_name_list_or_tensor(by_class):
    one = by_class.sample(2, condition=1)
    for target in ("dog", [1, 1], ["dog", 1], torch.tensor([1, 1]), torch.tensor([0.0, 1, 0]), np.int64(1)):
        assert torch.equal(by_class.sample(2, condition=target), one), target
    mixed = by_class.sample(2, condition=["cat", "dog"])
    torch.testing.assert_close(mixed[1:], one[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0], one[0])


def test_attributes_by_name_or_tensor(by_attributes):
    target = by_attributes.sample(2, condition={"Smiling": 1, "Blond_Hair": 1})
    row = torch.tensor([0.0, 1.0, 1.0])  # Blond_Hair clears Black_Hair
    assert torch.equal(target, by_attributes.sample(2, condition=row))
    assert torch.equal(target, by_attributes.sample(2, condition=row.repeat(2, 1)))
    unknown = by_attributes.condition({}, 2)
    assert torch.equal(unknown, torch.full((2, 3), 0.5))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (3, r"class 3 is not known; known: 0 \(cat\), 1 \(dog\), 2 \(7\)"),
        ("bird", "class bird is not known"),
        (None, "none was given; known: cat, dog, 7"),
        ([0, 1, 2], "3 classes for 2 images"),
        (torch.zeros(2, 4), r"is \(3,\) or \(2, 3\), not \(2, 4\)"),
    ],
)
def test_unknown_classes_get_the_list(by_class, target, message):
    with pytest.raises(ValueError, match=message):
        by_class.sample(2, condition=target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"Smilling": 1}, "Smilling is not known; did you mean Smiling. Known: Black_Hair, Blond_Hair, Smiling"),
        ({"xyz": 1}, r"^attribute: xyz is not known\. Known: Black_Hair, Blond_Hair, Smiling$"),
        ({"Black_Hair": 1, "Blond_Hair": 1}, "Black_Hair and Blond_Hair exclude each other"),
        ({"Smiling": 2}, "a strength is from 0"),
        (1, "the model is conditional on attributes"),
    ],
)
def test_unknown_attributes_get_the_list(by_attributes, target, message):
    with pytest.raises(ValueError, match=message):
        by_attributes.sample(2, condition=target)


def test_a_name_takes_precedence_over_a_number(by_class):
    """The class with the name "7" is number 2."""
    assert torch.equal(by_class.condition("7", 1), torch.tensor([[0.0, 0, 1]]))
    assert torch.equal(by_class.condition(2, 1), torch.tensor([[0.0, 0, 1]]))


CLASSES = tuple("0123456789")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), min_size=1))
def test_ranges_of_classes_are_what_they_say(spans):
    text = ",".join(f"{first}-{last}" for first, last in spans)
    assert parse_classes(text, CLASSES) == [n for first, last in spans for n in range(first, last + 1)]


def test_classes_as_users_write_them():
    assert parse_classes("0-2,Shirt, 4", ("T-shirt", "Trouser", "Pullover", "Shirt", "Coat")) == [0, 1, 2, 3, 4]
    assert parse_classes("1-2", ("1-2", "x")) == [0]  # a name goes before a range
    for text, message in (("0-10", "class 10 is not known"), ("5-2", "descending; write 2-5"), ("", "is not known")):
        with pytest.raises(ValueError, match=message):
            parse_classes(text, CLASSES)


def test_settings_as_users_write_them():
    assert parse_settings("Smiling=1,Eyeglasses=0.5") == {"Smiling": 1.0, "Eyeglasses": 0.5}
    for text in ("Smiling", "Smiling=yes"):
        with pytest.raises(ValueError, match="given as NAME=1 or NAME=0"):
            parse_settings(text)


def test_a_condition_of_each_kind_has_its_size():
    attributes = AttributeCondition(chosen=NAMES)
    assert to_condition({"Smiling": 0.3}, attributes, (), 4).tolist() == [[0.5, 0.5, pytest.approx(0.3)]] * 4
    assert to_condition(2, ClassCondition(num_classes=3), ("a", "b", "c"), 2).tolist() == [[0, 0, 1]] * 2
    assert to_condition(None, None, (), 4) is None
