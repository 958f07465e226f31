"""What a person sees of a command: color, where the terminal has it, and lines that are aligned.

Colors follow NO_COLOR (no-color.org) and TERM=dumb, and are for terminals alone.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TextIO

STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, stream: TextIO) -> str:
    """The text in one of STYLES where it is written to a terminal with colors; as it is elsewhere."""
    if not style or os.environ.get("NO_COLOR") or not is_terminal(stream):
        return text
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m"


def aligned(facts: Mapping[str, str | Sequence[str]], indent: str = "  ") -> list[str]:
    """A line for each fact, or for each of its parts, with the texts below each other. Facts without a text are
    omitted.
    """
    lines, width = [], max(map(len, facts), default=0)
    for name, text in facts.items():
        for number, part in enumerate([text] if isinstance(text, str) else text):
            if part:
                lines.append(f"{indent}{'' if number else name:<{width}}  {part}")
    return lines
