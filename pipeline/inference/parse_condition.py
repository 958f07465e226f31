"""What people write for a condition, made into tensors.

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
    asked: ConditionLike, condition: Condition | None, classes: Sequence[str], count: int
) -> Tensor | None:
    """(count, K) float32, or None for a model that takes no condition.

    `asked`: a class for all images or one for each, by number or name; {attribute: strength} for all images, where
    those not named stay unknown; or the condition itself, (K,) or (count, K). Raises ValueError, with what is known,
    for anything that the model was not told in training, and where it needs a condition and is asked for none.
    """
    if condition is None:
        if asked is not None:
            raise ValueError("the model was trained without a condition, so it can be told no class or attribute")
        return None
    if isinstance(asked, Tensor) and asked.is_floating_point():
        return _as_given(asked, condition.size, count)
    if isinstance(condition, ClassCondition):
        return _one_hot(asked, condition, classes, count)
    return _attributes(asked, condition).expand(count, -1).clone()


def parse_classes(text: str, classes: Sequence[str]) -> list[int]:
    """`0-9,Shirt` to class numbers, in the order asked. Raises ValueError with the list of the known ones."""
    numbers: list[int] = []
    for word in text.split(","):
        span = re.fullmatch(r"(\d+)-(\d+)", word.strip())
        if span and word.strip() not in classes:
            first, last = int(span[1]), class_number(span[2], classes)
            if first > last:
                raise ValueError(f"classes {word.strip()}: counts down; write {last}-{first}")
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


def class_number(asked: int | str, classes: Sequence[str]) -> int:
    """The number of a class given by number or name; a name goes before a number."""
    word = str(asked)
    if isinstance(asked, str) and word in classes:
        return classes.index(word)
    if word.isdecimal() and int(word) < len(classes):
        return int(word)
    numbered = ", ".join(str(i) if name == str(i) else f"{i} ({name})" for i, name in enumerate(classes))
    raise ValueError(f"class {word} is not known; known: {numbered}")


def _as_given(asked: Tensor, size: int, count: int) -> Tensor:
    if asked.shape not in ((size,), (count, size)):
        raise ValueError(f"a condition for {count} images is ({size},) or ({count}, {size}), not {tuple(asked.shape)}")
    return asked.float().expand(count, -1)


def _one_hot(asked: ConditionLike, condition: ClassCondition, classes: Sequence[str], count: int) -> Tensor:
    if asked is None or isinstance(asked, Mapping):
        known = ", ".join(classes)
        raise ValueError(f"the model is told a class, and none was given; known: {known}")
    words = asked.tolist() if hasattr(asked, "tolist") else asked  # a tensor, or a number of NumPy's
    words = [words] if isinstance(words, int | str) else list(words)
    numbers = [class_number(word, classes) for word in words]
    if len(numbers) not in (1, count):
        raise ValueError(f"{len(numbers)} classes for {count} images; give one for all, or one for each")
    numbers = numbers * count if len(numbers) == 1 else numbers
    return F.one_hot(torch.tensor(numbers, dtype=torch.int64), condition.num_classes).float()


def _attributes(asked: ConditionLike, condition: AttributeCondition) -> Tensor:
    """(1, K)."""
    if not isinstance(asked, Mapping | None):
        raise ValueError(
            f"the model is told attributes: give {{name: 1 or 0}}, or a float tensor with columns "
            f"{', '.join(condition.chosen)}"
        )
    check_attributes(asked or {}, condition)
    return condition.changed(torch.full((1, condition.size), UNKNOWN), asked or {})


def check_attributes(asked: Mapping[str, float], condition: AttributeCondition) -> None:
    """Raises ValueError for attributes that are not known or exclude each other, and for strengths outside [0, 1]."""
    for name, value in asked.items():
        find_name(name, condition.chosen, "attribute")
        if not 0 <= float(value) <= 1:
            raise ValueError(f"attribute {name}={value:g}: a strength is from 0 (absent) to 1 (present)")
    for group in condition.exclusive:
        present = [name for name in group if asked.get(name, 0) > UNKNOWN]
        if len(present) > 1:
            raise ValueError(f"attributes {' and '.join(present)} exclude each other; ask for one of them")
