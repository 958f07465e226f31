"""The base of every configuration section: strict and frozen; unknown keys are errors."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=2**16, strict=True)]
"""A width, or a number of channels or features."""

Layers = Annotated[int, Field(ge=1, le=100, strict=True)]
"""How many layers, cells or groups of one kind."""


class Section(BaseModel):
    """One section of a recipe. Declared beside the code that it configures; composed in `recipe.py`.

    Values are never coerced (no "1" for 1), numbers are finite, unknown keys are errors, and nothing changes after
    construction.
    The text below a field is its line in docs/settings.md.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
