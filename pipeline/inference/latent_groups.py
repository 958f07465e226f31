"""Latent groups as users name them: the first so many of them, and a temperature for each resolution.

A group's name is its resolution and a number: `8x8_group03`. Groups are counted in the order of sampling, lowest
resolution first.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from pipeline.models.base import LatentGroup, Temperature, group_temperatures
from pipeline.models.conditions import find_name

TemperatureLike = Temperature | Mapping[str, float]
"""One number; one for each group; or {resolution or group: number}, with 1 for groups that are not named."""


def resolution(group: LatentGroup) -> str:
    """`8x8` of `8x8_group03`."""
    return group.name.partition("_")[0]


def listed(groups: Sequence[LatentGroup]) -> str:
    """All groups in one line, for messages: `4x4_group00 to 4x4_group03, 8x8_group00`."""
    parts = []
    for _, same in groupby(groups, key=resolution):
        first, *_, last = [group.name for group in same] * 2
        parts.append(first if first == last else f"{first} to {last}")
    return ", ".join(parts)


def parse_first_groups(text: str, groups: Sequence[LatentGroup], option: str) -> int:
    """How many of the first groups are meant: `3`; `8x8`, all up to this resolution; or `8x8_group03`, all up to this
    group.

    Raises ValueError, which names the groups, for anything else.
    """
    if text.isdecimal() and int(text) <= len(groups):
        return int(text)
    counts = {name: k for k, group in enumerate(groups, start=1) for name in (resolution(group), group.name)}
    if text not in counts:
        raise ValueError(
            f"{option} {text}: give a number from 0 to {len(groups)}, a resolution or a group; the groups in the order "
            f"of sampling are {listed(groups)}"
        )
    return counts[text]


def find_group(text: str, groups: Sequence[LatentGroup], option: str) -> int:
    """The index of a group, given by its name, or by its resolution if it is the only one there. Raises ValueError,
    which names the groups, for anything else.
    """
    found = [k for k, group in enumerate(groups) if text in (group.name, resolution(group))]
    if len(found) != 1:
        raise ValueError(f"{option} {text}: give one of the groups {listed(groups)}")
    return found[0]


def parse_temperature(text: str) -> float | dict[str, float]:
    """`0.7`, or `4x4=1,8x8=0.7` as {"4x4": 1.0, "8x8": 0.7}. Raises ValueError for anything else."""
    words = [word.rpartition("=") for word in text.split(",")]
    try:
        values = {name.strip(): float(value) for name, _, value in words}
    except ValueError:
        values = {}
    if not values or ("" in values and len(words) > 1):
        raise ValueError(f"--temperature {text}: give a number, or one by resolution or group, such as 4x4=1,8x8=0.7")
    for value in values.values():
        if not 0 <= value < math.inf:
            raise ValueError(f"--temperature {text}: must be a finite number of at least 0")
    return values.get("", values)


def temperature_text(temperature: float | Mapping[str, float]) -> str:
    """As it is written on a command line, and in the name of a file."""
    if isinstance(temperature, Mapping):
        return ",".join(f"{name}={value:g}" for name, value in temperature.items())
    return f"{temperature:g}"


def resolve_temperature(temperature: TemperatureLike, groups: Sequence[LatentGroup]) -> tuple[float, ...]:
    """The temperature of each group. The one of a group takes precedence over the one of its resolution.

    Raises ValueError for unknown names, with the known ones, and for temperatures that are negative or not finite.
    """
    if isinstance(temperature, Mapping):
        known = [*dict.fromkeys(map(resolution, groups)), *(group.name for group in groups)]
        for name in temperature:
            find_name(name, known, "temperature")
        temperature = [temperature.get(group.name, temperature.get(resolution(group), 1.0)) for group in groups]
    return group_temperatures(temperature, groups)
