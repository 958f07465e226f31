"""Text for the terminal."""

from collections.abc import Mapping, Sequence

from shard_data.terminal import padded


def printable(text: str) -> str:
    """With `?` for control characters: names that come from files could control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def joined(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: a name at the left of each row, and figures at the right of their columns."""
    to_right = [number > 0 for row in rows[:1] for number in range(len(row))]
    return ["  ".join(cells) for cells in padded(rows, to_right)]


def figure_lines(figures: Mapping[str, float]) -> list[str]:
    """A line for each figure. Those of several kinds for the same parts, `kl/GROUP` and `active_units/GROUP`, are
    columns of a table below instead, with a line for each part.
    """
    parts: dict[str, list[str]] = {}  # by kind
    for kind, _, part in (name.rpartition("/") for name in figures):
        parts.setdefault(kind, []).append(part)
    kinds: dict[frozenset[str], list[str]] = {}  # by the parts that they have in common
    for kind in parts:
        kinds.setdefault(frozenset(parts[kind]), []).append(kind)
    tables = [columns for columns in kinds.values() if len(columns) > 1]
    in_tables = {kind for columns in tables for kind in columns}
    alone = {name: value for name, value in figures.items() if name.rpartition("/")[0] not in in_tables}
    lines = joined([[name, f"{value:12.4f}"] for name, value in alone.items()])
    for columns in tables:
        lines += ["", *_table_lines(figures, parts[columns[0]], columns)]
    return [printable(line) for line in lines]


def _table_lines(figures: Mapping[str, float], parts: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """A column for each of the kinds. What all their names begin with, `edit/`, is the head of the first column."""
    prefix = kinds[0].rpartition("/")[0] + "/"
    prefix = prefix if all(kind.startswith(prefix) for kind in kinds) else ""
    head = [prefix, *(kind.removeprefix(prefix) for kind in kinds)]
    return joined([head, *([part, *(f"{figures[f'{kind}/{part}']:10.4f}" for kind in kinds)] for part in parts)])
