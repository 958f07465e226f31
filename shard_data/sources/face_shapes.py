"""The outlines of toy_faces, in face coordinates: -1 to 1 across the image, to the right and down."""

from math import pi

import numpy as np

LINE = np.linspace(-1, 1, 13)
PIVOT = np.array([0.0, 0.45])  # about which the head tilts


def arc(start: float, stop: float, rx: float, ry: float, x: float = 0, y: float = 0, count: int = 20) -> np.ndarray:
    """Points (count, 2) of an ellipse between two angles, in half turns: 0 right, 0.5 down, 1 left, 1.5 up."""
    angles = pi * np.linspace(start, stop, count)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def face_outline() -> np.ndarray:
    """An oval (48, 2), slightly narrower at the jaw."""
    x, y = arc(0, 2, 1, 1, count=49)[:-1].T
    narrowing = 1 - 0.10 * np.maximum(y, 0) ** 2
    return np.stack([0.56 * x * narrowing, -0.04 + np.where(y > 0, 0.68, 0.62) * y], axis=1)


def joined(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)


CIRCLE = arc(0, 2, 1, 1, count=33)[:-1]
FACE = face_outline()
NECK = np.array([(-0.19, 0.4), (0.19, 0.4), (0.21, 0.82), (-0.21, 0.82)])

SHORT_HAIR = arc(0.92, 2.08, 0.62, 0.66, y=-0.16)
LONG_HAIR = joined(
    arc(1, 2, 0.68, 0.68, y=-0.14), arc(0, 0.5, 0.20, 0.20, x=0.54, y=0.72), arc(0.5, 1, 0.20, 0.20, x=-0.54, y=0.72)
)
CROWN = arc(0.98, 2.02, 0.60, 0.66, y=-0.12)
HAIRLINE = joined(CROWN, arc(1.97, 1.35, 0.52, 0.36, x=-0.02, y=-0.10), arc(1.3, 1.03, 0.42, 0.30, x=-0.13, y=-0.12))
FRINGE_X = np.array([0.53, 0.42, 0.30, 0.18, 0.04, -0.10, -0.24, -0.38, -0.53])
FRINGE_Y = np.array([-0.16, -0.28, -0.26, -0.32, -0.27, -0.33, -0.26, -0.30, -0.16])
FRINGE = joined(CROWN, np.stack([FRINGE_X, FRINGE_Y], axis=1))
GLOSS = arc(1.25, 1.45, 0.46, 0.52, y=-0.12, count=6)

DOME = arc(1, 2, 0.66, 0.62, y=-0.36)
CUFF = joined(arc(1.03, 1.97, 0.72, 0.16, y=-0.39), arc(0.06, 0.94, 0.70, -0.10, y=-0.215))
