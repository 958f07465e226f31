"""The factors of variation of toy_faces. face_drawing renders them.

All factors are sampled independently; a face is a function of (seed, index). Binary attributes have CelebA's names. The
four hair colors are values of one factor, whose fifth value is red: so at most one of the four attributes is present.
"""

import difflib
from dataclasses import dataclass, replace

import numpy as np

from shard_data.errors import DataError

HAIR_COLORS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
RED = "red"
HAIR_STYLES = ("short", "long", "curly")
PRESENCE = {  # probability of the attributes that are factors of their own
    "Bangs": 0.30,
    "Big_Nose": 0.30,
    "Bushy_Eyebrows": 0.30,
    "Eyeglasses": 0.25,
    "Goatee": 0.15,
    "Mouth_Slightly_Open": 0.40,
    "Mustache": 0.15,
    "Narrow_Eyes": 0.20,
    "Pale_Skin": 0.20,
    "Rosy_Cheeks": 0.25,
    "Smiling": 0.55,
    "Wearing_Earrings": 0.30,
    "Wearing_Hat": 0.18,
    "Wearing_Lipstick": 0.25,
}
ATTRIBUTES = tuple(sorted((*HAIR_COLORS, *PRESENCE)))


@dataclass(frozen=True)
class Face:
    """One value of every factor."""

    present: frozenset[str]
    """Which attributes of PRESENCE the face has."""
    hair_color: str
    """One of HAIR_COLORS, or RED."""
    hair_style: str
    """One of HAIR_STYLES."""
    turn: float
    """To the right, in [-1.2, 1.2]."""
    tilt: float
    """Clockwise, in degrees."""
    shift: tuple[float, float]
    """Right and down, in half widths of the image."""
    zoom: float
    skin: float
    """Light to dark, in [0, 1]."""
    hair_shade: float
    """Dark to light within the color, in [0, 1]."""
    eye_color: float
    backdrop_hue: float
    clothes_hue: float
    hat_hue: float
    light: float
    """Its direction: from the left (-1) to from the right (1)."""
    brightness: float


def sample_factors(seed: int, index: int) -> Face:
    """The factors of face number `index`: a function of the two arguments only."""
    u = iter(np.random.default_rng([seed, index]).random(40).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(u)

    def bell(width: float) -> float:
        return (next(u) + next(u) - 1) * width

    return Face(
        present=frozenset(name for name, share in PRESENCE.items() if next(u) < share),
        hair_color=(*HAIR_COLORS, RED)[int(next(u) * 5)],
        hair_style=HAIR_STYLES[int(next(u) * len(HAIR_STYLES))],
        turn=bell(1.2),
        tilt=bell(9.0),
        shift=(bell(0.06), 0.05 + bell(0.04)),
        zoom=between(0.98, 1.07),
        skin=between(0.0, 1.0),
        hair_shade=between(0.0, 1.0),
        eye_color=between(0.0, 1.0),
        backdrop_hue=between(0.0, 1.0),
        clothes_hue=between(0.0, 1.0),
        hat_hue=between(0.0, 1.0),
        light=between(-1.0, 1.0),
        brightness=between(0.94, 1.05),
    )


def attributes(face: Face) -> dict[str, int]:
    """Every attribute by name: 1 present, 0 absent."""
    return {name: int(name in face.present or name == face.hair_color) for name in ATTRIBUTES}


def hidden(face: Face) -> frozenset[str]:
    """The attributes that the image cannot show, present or not: a hat covers the forehead, and so bangs."""
    return frozenset({"Bangs"} if "Wearing_Hat" in face.present else ())


def edit(face: Face, **changes: bool) -> Face:
    """The same face with some attributes set or cleared: `edit(face, Smiling=True, Blond_Hair=True)`.

    Setting a hair color clears the other hair colors; clearing the present one gives red hair. Everything else stays
    the same. Raises DataError for an unknown attribute and for two hair colors at once.
    """
    for name in changes:
        _check_name(name)
    colors = [name for name in HAIR_COLORS if changes.get(name)]
    if len(colors) > 1:
        raise DataError(f"{' and '.join(colors)}: hair has one color; set one of them")
    color = colors[0] if colors else RED if changes.get(face.hair_color) is False else face.hair_color
    flags = {name: value for name, value in changes.items() if name in PRESENCE}
    present = {name for name in PRESENCE if flags.get(name, name in face.present)}
    return replace(face, present=frozenset(present), hair_color=color)


def _check_name(name: str) -> None:
    if name not in ATTRIBUTES:
        near = difflib.get_close_matches(name, ATTRIBUTES, 1)
        hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(ATTRIBUTES)}"
        raise DataError(f"{name}: unknown attribute; {hint}")
