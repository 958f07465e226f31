"""The defaults of all settings, without the classes that state them, which need torch.

`python -m pipeline.recipe --defaults > pipeline/configs/defaults.json` writes the file.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "configs" / "defaults.json"
REQUIRED = object()
"""Of a setting without a default, and of one that is not a setting today."""


@functools.cache
def all_defaults() -> dict[str, dict[str, Any]]:
    """{setting: {name of the section that has it: default}}; the name of a section without a name is empty."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def default_of(path: str, settings: Mapping[str, Any]) -> Any:
    """The default of a setting among these: it can depend on `name` of its section, or of the one around that."""
    variants = all_defaults().get(path, {})
    section = path.rpartition(".")[0]
    around = section.rpartition(".")[0]
    kind, outer = (settings.get(f"{place}.name") for place in (section, around))
    return next((variants[name] for name in (f"{outer}.{kind}", kind, outer, "") if name in variants), REQUIRED)
