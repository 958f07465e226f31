"""What a conditional model is conditioned on, as a config section: the class, or attributes.

A condition is a tensor (B, size): one-hot over the classes, or one column per attribute with 1 for present, 0 for
absent and 1/2 for unknown.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.schema import Section

UNKNOWN = 0.5


class ClassCondition(Section):
    """Conditions the model on the class of each image."""

    name: Literal["class"] = "class"
    num_classes: Annotated[int, Field(ge=2, le=2**16)]
    """Number of classes of the data set."""

    @property
    def size(self) -> int:
        """Columns of the condition."""
        return self.num_classes

    def check(self, classes: Sequence[str] | None, attribute_names: Sequence[str] | None) -> None:
        """Raises ValueError if the data set does not have these classes."""
        if classes is None:
            raise ValueError("condition.name=class: the data set has no classes")
        if len(classes) != self.num_classes:
            raise ValueError(f"condition.num_classes={self.num_classes}: the data set has {len(classes)}")

    def encode(self, labels: Tensor, attributes: Tensor, attribute_names: Sequence[str] | None) -> Tensor:
        """(B, num_classes) float32 from labels (B,). Raises ValueError for an image without a label."""
        if bool((labels < 0).any()):
            raise ValueError("condition.name=class: an image of the data set has no label")
        return F.one_hot(labels, self.num_classes).float()


class AttributeCondition(Section):
    """Conditions the model on attributes of each image."""

    name: Literal["attributes"] = "attributes"
    chosen: Annotated[tuple[str, ...], Field(min_length=1)]
    """Attributes of the data set, in the order of the condition's columns."""
    exclusive: tuple[tuple[str, ...], ...] = ()
    """Groups of attributes of which at most one is present: setting one (Blond_Hair) clears the others (Black_Hair)."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        repeated = sorted({name for name in self.chosen if self.chosen.count(name) > 1})
        if repeated:
            raise ValueError(f"condition.chosen: {', '.join(repeated)} repeated")
        for group in self.exclusive:
            for name in group:
                find_name(name, self.chosen, "condition.exclusive")
        return self

    @property
    def size(self) -> int:
        """Columns of the condition."""
        return len(self.chosen)

    def check(self, classes: Sequence[str] | None, attribute_names: Sequence[str] | None) -> None:
        """Raises ValueError if the data set does not have these attributes."""
        if attribute_names is None:
            raise ValueError("condition.name=attributes: the data set has no attributes")
        for name in self.chosen:
            find_name(name, attribute_names, "condition.chosen")

    def encode(self, labels: Tensor, attributes: Tensor, attribute_names: Sequence[str] | None) -> Tensor:
        """(B, size) float32 from all attributes (B, A) of the data set: 1, 0, or -1 for unknown."""
        chosen = attributes[:, [attribute_names.index(name) for name in self.chosen]].float()  # (B, size)
        return torch.where(chosen < 0, UNKNOWN, chosen)

    def rivals(self, name: str) -> list[int]:
        """Columns of the attributes that exclude this one."""
        return sorted(
            {self.chosen.index(other) for group in self.exclusive if name in group for other in group if other != name}
        )

    def changed(self, condition: Tensor, settings: Mapping[str, float]) -> Tensor:
        """A copy of the condition (B, size) with attributes set. Setting one to v limits its rivals to 1 - v.

        Raises ValueError, listing the known attributes, for one that the model is not conditioned on.
        """
        changed = condition.clone()
        for name, value in settings.items():
            column = self.chosen.index(find_name(name, self.chosen, "attribute"))
            for rival in self.rivals(name):
                changed[:, rival] = changed[:, rival].clamp(max=1 - min(max(value, 0.0), 1.0))
            changed[:, column] = value
        return changed


Condition = Annotated[ClassCondition | AttributeCondition, Field(discriminator="name")]


def find_name(name: str, known: Sequence[str], what: str) -> str:
    """`name`, if it is among `known`. Otherwise raises ValueError with a suggestion and the known names."""
    if name in known:
        return name
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ValueError(f"{what}: {name} is not known{hint} Known: {', '.join(known) or 'none'}")
