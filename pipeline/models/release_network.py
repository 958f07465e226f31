"""Whether the options of another implementation describe a model of this project."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.models.base import ModelConfig


class Network(NamedTuple):
    """The arguments of a model's constructor."""

    config: ModelConfig
    image_shape: tuple[int, int, int]
    """(channels, height, width), border included."""
    border: int
    bits: int


def check_same(wanted: Network, described: Network, dataset: str) -> None:
    """Raises ValueError, with each setting of `wanted` that differs in `described`, the network that the options of a
    release describe.

    All settings are compared, so that one that is added to a model cannot be lost. `dataset`: of the release, by which
    its options state pixels and image size.
    """
    problems = list(_differences(_settings(wanted), _settings(described), ""))
    if problems:
        raise ValueError(
            f"the release has no option for {', '.join(problems)} with images like those of its data set {dataset}"
        )


def _settings(network: Network) -> dict[str, Any]:
    """The sections of a recipe that make the network."""
    channels, side, _ = network.image_shape
    data = {"channels": channels, "size": side - 2 * network.border, "pad": network.border, "bits": network.bits}
    return {"model": network.config.model_dump(mode="json"), "data": data}


def _differences(wanted: Mapping[str, Any], described: Mapping[str, Any], path: str) -> Iterator[str]:
    """`setting=value (it has VALUE)`; of a section of another kind its name alone."""
    names = ["name"] if wanted.get("name") != described.get("name") else list(wanted)
    for name in names:
        value, other = wanted[name], described[name]
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differences(value, other, f"{path}{name}.")
        elif value != other:
            yield f"{path}{name}={_shown(value)} (it has {_shown(other)})"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
