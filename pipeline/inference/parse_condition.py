"""Conditions as users write them, converted to tensors.

A class is a number or a name. An attribute is a name with a strength, 1 for present and 0 for absent.
"""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.conditions import UNKNOWN, AttributeCondition, ClassCondition, Condition, find_name

ConditionLike = int | str | Sequence[int | str] | Mapping[str, float] | Tensor | None


def to_condition(
    target: ConditionLike, condition: Condition | None, classes: Sequence[str], count: int
) -> Tensor | None:
    """(count, K) float32, or None for a model without a condition.

    `target`: a class for all images or one for each, by number or name; {attribute: strength} for all images, where
    attributes that are not named are unknown; or the condition itself, (K,) or (count, K). `condition`: what the model
    was trained with. Raises ValueError for unknown classes and attributes, with the list of the known ones, and for a
    missing condition.
    """
    if condition is None:
        if target is not None:
            raise ValueError("the model was trained without a condition, so it takes no class or attribute")
        return None
    if isinstance(target, Tensor) and target.is_floating_point():
        return _as_given(target, condition.size, count)
    if isinstance(condition, ClassCondition):
        return _one_hot(target, condition, classes, count)
    return _attributes(target, condition).expand(count, -1).clone()


def parse_classes(text: str, classes: Sequence[str]) -> list[int]:
    """`0-9,Shirt` to class numbers, in this order. Raises ValueError with the list of the known ones."""
    numbers: list[int] = []
    for word in text.split(","):
        span = re.fullmatch(r"(\d+)-(\d+)", word.strip())
        if span and word.strip() not in classes:
            first, last = int(span[1]), class_number(span[2], classes)
            if first > last:
                raise ValueError(f"classes {word.strip()}: the range is descending; write {last}-{first}")
            numbers += range(first, last + 1)
        else:
            numbers.append(class_number(word.strip(), classes))
    return numbers


def parse_settings(text: str) -> dict[str, float]:
    """`Smiling=1,Eyeglasses=0` to {attribute: strength}. Raises ValueError for anything else."""
    settings: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        name, equals, value = word.partition("=")
        try:
            settings[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"{word!r}: attributes are given as NAME=1 or NAME=0") from None
    return settings


def class_number(wanted: int | str, classes: Sequence[str]) -> int:
    """The number of a class given by number or name. A name takes precedence over a number."""
    word = str(wanted)
    if isinstance(wanted, str) and word in classes:
        return classes.index(word)
    if word.isdecimal() and int(word) < len(classes):
        return int(word)
    numbered = ", ".join(str(i) if name == str(i) else f"{i} ({name})" for i, name in enumerate(classes))
    raise ValueError(f"class {word} is not known; known: {numbered}")


def _as_given(rows: Tensor, size: int, count: int) -> Tensor:
    if rows.shape not in ((size,), (count, size)):
        raise ValueError(f"a condition for {count} images is ({size},) or ({count}, {size}), not {tuple(rows.shape)}")
    return rows.float().expand(count, -1)


def _one_hot(target: ConditionLike, condition: ClassCondition, classes: Sequence[str], count: int) -> Tensor:
    if target is None or isinstance(target, Mapping):
        known = ", ".join(classes)
        raise ValueError(f"the model is conditional on a class, and none was given; known: {known}")
    words = target.tolist() if hasattr(target, "tolist") else target  # a tensor, or a NumPy number
    words = [words] if isinstance(words, int | str) else list(words)
    numbers = [class_number(word, classes) for word in words]
    if len(numbers) not in (1, count):
        raise ValueError(f"{len(numbers)} classes for {count} images; give one for all, or one for each")
    numbers = numbers * count if len(numbers) == 1 else numbers
    return F.one_hot(torch.tensor(numbers, dtype=torch.int64), condition.num_classes).float()


def _attributes(target: ConditionLike, condition: AttributeCondition) -> Tensor:
    """(1, K)."""
    if not isinstance(target, Mapping | None):
        raise ValueError(
            f"the model is conditional on attributes: give {{name: 1 or 0}}, or a float tensor with columns "
            f"{', '.join(condition.chosen)}"
        )
    check_attributes(target or {}, condition)
    return condition.changed(torch.full((1, condition.size), UNKNOWN), target or {})


def check_strength(name: str, value: float) -> None:
    """Raises ValueError for a strength of an attribute outside [0, 1]."""
    if not 0 <= float(value) <= 1:  # NaN is not either
        raise ValueError(f"attribute {name}={value:g}: a strength is from 0 (absent) to 1 (present)")


def check_attributes(target: Mapping[str, float], condition: AttributeCondition) -> None:
    """Raises ValueError for unknown attributes, several exclusive ones, and strengths outside [0, 1]."""
    for name, value in target.items():
        find_name(name, condition.chosen, "attribute")
        check_strength(name, value)
    for group in condition.exclusive:
        present = [name for name in group if target.get(name, 0) > UNKNOWN]
        if len(present) > 1:
            raise ValueError(f"attributes {' and '.join(present)} exclude each other; set one of them")
