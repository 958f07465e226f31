"""Facts that must be equal on all processes before they train."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def code_version() -> str:
    """A sha256 over this package's Python sources, to detect nodes with different checkouts. Takes milliseconds."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def disagreement(facts: Sequence[Mapping[str, str]]) -> str | None:
    """A message about the facts that differ between ranks (`facts` in rank order); None if they are equal."""
    names = sorted(set().union(*facts))
    lines = [_line(name, [rank.get(name, "nothing") for rank in facts]) for name in names]
    differing = [line for line in lines if line is not None]
    if not differing:
        return None
    advice = "start all processes with the same command, from the same code and data"
    return "\n".join(["the processes do not agree; " + advice, *differing])


def _line(name: str, values: Sequence[str]) -> str | None:
    ranks = defaultdict(list)
    for rank, value in enumerate(values):
        ranks[value].append(rank)
    if len(ranks) == 1:
        return None
    parts = [f"{value} on rank {_ranges(having)}" for value, having in ranks.items()]
    return f"  {name}: {'; '.join(parts)}"


def _ranges(ranks: Sequence[int]) -> str:
    """Ascending numbers as `0-6, 8`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
