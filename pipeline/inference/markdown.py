"""Strings of strangers in Markdown: shown as text, so that they cannot become markup or end a block."""

import re

from pipeline.inference.text import printable

MAX_LENGTH = 200
"""Characters of a string that are shown."""


def escape(text: str) -> str:
    """Text of one line."""
    text = re.sub(r"([\\`*{}\[\]<>#|~&$!])", r"\\\1", printable(text)[:MAX_LENGTH])
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word it is no markup


def code(value: object) -> str:
    """A code span of one line, which may stand in a table. Characters that would end it are replaced."""
    shown = printable(str(value)).translate({ord("`"): "'", ord("|"): "/"})
    return f"`{shown[:MAX_LENGTH].strip() or '?'}`"


def block(text: str, language: str) -> str:
    """A code block, whatever is in the text."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def bullets(lines: list[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)
