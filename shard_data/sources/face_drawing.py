"""Drawing of toy_faces: a picture as a pure function of its factors.

Coordinates run from -1 to 1, right and down. Everything is a polygon in them, moved by the pose and drawn at several times the size;
reducing it once makes the edges smooth.
"""

import colorsys
from functools import lru_cache
from math import cos, pi, radians, sin

import numpy as np
from PIL import Image, ImageDraw

from shard_data.sources.face_factors import RED, Face

Colour = tuple[int, int, int]

ANGLES = np.linspace(0, 2 * pi, 32, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)  # (32, 2)
LINE = np.linspace(-1, 1, 13)
PIVOT = np.array([0.0, 0.45])  # about which the head tilts

SKINS = np.array([(246, 206, 168), (236, 184, 142), (222, 164, 118), (186, 124, 82), (150, 96, 64), (112, 70, 50)])
PALE = np.array([(255, 234, 222), (250, 226, 214)])
HAIRS = {  # darkest, lightest, and the colour of what lies behind the head
    "Black_Hair": ((24, 22, 28), (48, 42, 52), (18, 16, 20)),
    "Blond_Hair": ((226, 174, 74), (250, 216, 128), (198, 140, 56)),
    "Brown_Hair": ((84, 46, 26), (122, 70, 38), (62, 34, 20)),
    "Gray_Hair": ((150, 152, 162), (206, 208, 216), (126, 128, 140)),
    RED: ((172, 64, 30), (218, 100, 44), (136, 46, 22)),
}
EYES = np.array([(70, 42, 26), (104, 66, 30), (70, 104, 60), (52, 112, 140), (50, 84, 160)])
INK = (40, 30, 38)


def blend(a: Colour, b: Colour, t: float) -> Colour:
    """From `a` (t = 0) to `b` (t = 1)."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def along(palette: np.ndarray, t: float) -> Colour:
    """The colour at `t` in [0, 1] of a palette (N, 3)."""
    place = t * (len(palette) - 1)
    low = min(int(place), len(palette) - 2)
    return blend(tuple(palette[low].tolist()), tuple(palette[low + 1].tolist()), place - low)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))


class Look:
    """The colours of a face."""

    def __init__(self, face: Face):
        self.skin = along(PALE if "Pale_Skin" in face.present else SKINS, face.skin)
        self.shade = blend(self.skin, (120, 40, 40), 0.22)
        self.blush = blend(self.skin, (236, 70, 80), 0.50)
        dark, light, behind = HAIRS[face.hair_colour]
        self.hair = blend(dark, light, face.hair_shade)
        self.hair_behind = blend(behind, self.hair, 0.2)
        self.hair_light = blend(self.hair, (255, 240, 225), 0.28)
        self.brow = blend(self.hair, (40, 20, 12), 0.5)
        self.beard = blend(self.hair, (40, 20, 12), 0.28)
        self.lip = (206, 24, 62) if "Wearing_Lipstick" in face.present else blend(self.skin, (184, 50, 62), 0.55)
        self.lip_line = blend(self.lip, (60, 10, 20), 0.62)
        self.eye = along(EYES, face.eye_colour)
        self.backdrop = hsv(face.backdrop_hue, 0.30, 0.87)
        self.halo = hsv(face.backdrop_hue, 0.12, 0.97)
        self.clothes = hsv(face.clothes_hue, 0.55, 0.72)
        self.collar = hsv(face.clothes_hue, 0.60, 0.56)
        self.hat = hsv(face.hat_hue, 0.62, 0.80)
        self.cuff = hsv(face.hat_hue, 0.66, 0.62)


class Pen:
    """Draws shapes given in face coordinates on a canvas, moved by the pose."""

    def __init__(self, canvas: Image.Image, face: Face, tilt: float):
        self.draw = ImageDraw.Draw(canvas)
        self.turn = face.turn
        self.half = canvas.width / 2
        angle = radians(tilt)
        self.matrix = np.array([[cos(angle), sin(angle)], [-sin(angle), cos(angle)]]) * (face.zoom * self.half)
        self.origin = (np.add(PIVOT, face.shift) + 1) * self.half - PIVOT @ self.matrix

    def place(self, points: np.ndarray, depth: float) -> list[float]:
        """Canvas coordinates. `depth` is how far in front of the head's axis a shape lies: the turn moves it that much."""
        return (points @ self.matrix + (self.origin + (self.turn * depth) * self.matrix[0])).ravel().tolist()

    def fill(self, points: np.ndarray, colour: Colour, depth: float = 0.0) -> None:
        self.draw.polygon(self.place(points, depth), fill=colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour, depth: float = 0.0) -> None:
        self.fill(CIRCLE * (rx, ry) + (x, y), colour, depth)

    def line(self, points: np.ndarray, width: float, colour: Colour, depth: float = 0.0) -> None:
        self.draw.line(self.place(points, depth), fill=colour, width=round(width * self.half), joint="curve")

    def band(
        self, x: float, y: np.ndarray, half_width: float, thickness: np.ndarray, colour: Colour, depth: float
    ) -> None:
        """A stroke over x +- half_width whose middle runs through `y` (13,), `thickness` (13,) from top to bottom."""
        across = x + half_width * LINE
        upper, lower = np.stack([across, y - thickness / 2], 1), np.stack([across, y + thickness / 2], 1)
        self.fill(np.concatenate([upper, lower[::-1]]), colour, depth)


def draw_face(face: Face, size: int) -> np.ndarray:
    """The picture of a face, uint8 (size, size, 3)."""
    factor = 4 if size < 64 else 3
    look = Look(face)
    canvas = _backdrop(look, size * factor)
    head, body = Pen(canvas, face, face.tilt), Pen(canvas, face, 0.0)
    _hair_behind(head, face, look)
    _body(body, look)
    _ears(head, face, look)
    _skin(head, face, look)
    _nose(head, face, look)
    _facial_hair(head, face, look)
    _mouth(head, face, look)
    for side in (-1, 1):
        _eye(head, face, look, side)
    _hair_in_front(head, face, look)
    if "Eyeglasses" in face.present:
        _glasses(head)
    if "Wearing_Hat" in face.present:
        _hat(head, look)
    return _light(np.asarray(canvas.reduce(factor)), face)


@lru_cache(maxsize=4)
def _halo_mask(size: int) -> Image.Image:
    axis = np.linspace(-1, 1, size)
    distance = np.hypot(axis[None, :], axis[:, None] + 0.1)
    return Image.fromarray((255 * np.exp(-((distance / 0.95) ** 2) * 1.2)).astype(np.uint8))


def _backdrop(look: Look, size: int) -> Image.Image:
    canvas = Image.new("RGB", (size, size), look.backdrop)
    canvas.paste(look.halo, (0, 0, size, size), _halo_mask(size))
    return canvas


def _light(image: np.ndarray, face: Face) -> np.ndarray:
    """Brighter on the side that the light comes from."""
    across = np.linspace(-1, 1, image.shape[1], dtype=np.float32)[None, :, None]
    gain = face.brightness * (1 + 0.08 * face.light * across)
    return np.minimum(image * gain + 0.5, 255).astype(np.uint8)


def _hair_behind(pen: Pen, face: Face, look: Look) -> None:
    hat = "Wearing_Hat" in face.present
    if face.hair_style == "curly":
        for angle in np.linspace(-0.25, pi + 0.25, 12):
            x, y = 0.60 * cos(angle), -0.14 - 0.60 * sin(angle)
            if not hat or y > -0.3:
                pen.oval(x, y, 0.20, 0.20, look.hair_behind)
    elif face.hair_style == "long":
        pen.fill(LONG_HAIR, look.hair_behind)
    else:
        pen.fill(SHORT_HAIR, look.hair_behind)


def _body(pen: Pen, look: Look) -> None:
    pen.oval(0, 1.14, 0.86, 0.40, look.clothes)
    pen.oval(0, 0.80, 0.29, 0.15, look.collar)
    pen.oval(0, 0.78, 0.22, 0.13, look.shade)
    pen.fill(NECK, look.shade)


def _ears(pen: Pen, face: Face, look: Look) -> None:
    for side in (-1, 1):
        pen.oval(side * 0.55, 0.06, 0.10, 0.14, look.skin)
        pen.oval(side * 0.565, 0.07, 0.05, 0.08, look.shade)
        if "Wearing_Earrings" in face.present:
            pen.oval(side * 0.585, 0.27, 0.085, 0.085, (150, 90, 10))
            pen.oval(side * 0.585, 0.265, 0.062, 0.062, (255, 214, 60))


def _skin(pen: Pen, face: Face, look: Look) -> None:
    pen.fill(FACE, blend(look.skin, look.shade, 0.55))
    pen.fill(FACE * (0.95, 0.97) + (0.024 * face.light, -0.012), look.skin)
    if "Rosy_Cheeks" in face.present:
        for side in (-1, 1):
            pen.oval(side * 0.35, 0.235, 0.12, 0.085, look.blush, 0.08)


def _nose(pen: Pen, face: Face, look: Look) -> None:
    width, height = (0.125, 0.095) if "Big_Nose" in face.present else (0.055, 0.042)
    pen.oval(0, 0.175, width, height, look.shade, 0.14)
    pen.oval(0, 0.160, width * 0.8, height * 0.75, blend(look.skin, (255, 255, 255), 0.15), 0.15)


def _facial_hair(pen: Pen, face: Face, look: Look) -> None:
    if "Goatee" in face.present:
        pen.oval(0, 0.565, 0.19, 0.12, look.beard, 0.06)
    if "Mustache" in face.present:
        lobes = (0.075 + 0.045 * np.abs(np.sin(2 * LINE))) * (1 - LINE**4)
        pen.band(0, 0.278 + 0.05 * LINE**2, 0.28, lobes + 0.01, look.beard, 0.12)


def _mouth(pen: Pen, face: Face, look: Look) -> None:
    smiling, open_, painted = (n in face.present for n in ("Smiling", "Mouth_Slightly_Open", "Wearing_Lipstick"))
    width = 0.28 if smiling else 0.18
    bow = 1 - LINE**2
    middle = 0.36 + 0.10 * bow if smiling else 0.40 + 0 * bow
    rim = 0.095 if painted else 0.07
    if not open_:
        pen.band(0, middle, width, rim * (0.3 + 0.7 * bow), look.lip, 0.1)
        pen.band(0, middle, width, 0.032 * (0.5 + 0.5 * bow), look.lip_line, 0.1)
        return
    gape = (0.15 if smiling else 0.13) * bow
    pen.band(0, middle + 0.01, width + rim / 4, gape + rim * (0.4 + 0.6 * bow), look.lip, 0.1)
    pen.band(0, middle + 0.01, width - rim / 4, np.maximum(gape - rim * 0.1, 0.004), (92, 16, 30), 0.1)
    if smiling:
        pen.band(0, middle - 0.026, width * 0.82, 0.062 * bow, (255, 252, 246), 0.1)


def _eye(pen: Pen, face: Face, look: Look, side: int) -> None:
    x, y, depth = side * 0.245, 0.03, 0.09
    tall = 0.065 if "Narrow_Eyes" in face.present else 0.145
    pen.oval(x, y, 0.135, tall, (255, 255, 255), depth)
    pen.oval(x, y + 0.005, 0.100, min(0.118, tall), look.eye, depth + 0.03)
    pen.oval(x, y + 0.005, 0.058, min(0.070, tall * 0.9), INK, depth + 0.03)
    pen.oval(x - 0.034, y - 0.042 if tall > 0.1 else y - 0.02, 0.032, 0.034, (255, 255, 255), depth + 0.03)
    pen.band(x, y - tall * np.sqrt(1 - (0.98 * LINE) ** 2), 0.145, 0.045 + 0 * LINE, INK, depth)
    bushy = "Bushy_Eyebrows" in face.present
    arch = y - 0.215 - 0.035 * (1 - LINE**2)
    pen.band(x, arch, 0.16 if bushy else 0.13, (0.10 if bushy else 0.042) * (1 - 0.6 * LINE**4), look.brow, depth)


def _hair_in_front(pen: Pen, face: Face, look: Look) -> None:
    front = FRINGE if "Bangs" in face.present else HAIRLINE
    pen.fill(front * (0.93, 1) + (0, 0.035), look.shade)  # its shadow on the forehead
    pen.fill(front, look.hair)
    pen.line(GLOSS, 0.05, look.hair_light)


def _glasses(pen: Pen) -> None:
    for side in (-1, 1):
        pen.line(np.concatenate([CIRCLE, CIRCLE[:2]]) * (0.20, 0.19) + (side * 0.245, 0.04), 0.048, INK, 0.12)
        pen.line(np.array([(side * 0.44, 0.0), (side * 0.58, -0.02)]), 0.045, INK, 0.06)
    pen.line(np.array([(-0.06, 0.02), (0.06, 0.02)]), 0.045, INK, 0.12)


def _hat(pen: Pen, look: Look) -> None:
    pen.fill(DOME, look.hat)
    pen.fill(CUFF, look.cuff)


def _arc(
    start: float, stop: float, rx: float, ry: float, x: float = 0.0, y: float = 0.0, count: int = 20
) -> np.ndarray:
    """Points (count, 2) of an ellipse, from angle to angle in half turns: 0 right, 0.5 down, 1 left, 1.5 up."""
    angles = pi * np.linspace(start, stop, count)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def _face_outline() -> np.ndarray:
    points = _arc(0, 2, 1, 1, count=49)[:-1]
    jaw = np.maximum(points[:, 1], 0)
    return np.stack(
        [0.56 * points[:, 0] * (1 - 0.10 * jaw**2), -0.04 + np.where(jaw > 0, 0.68, 0.62) * points[:, 1]], 1
    )


FACE = _face_outline()
NECK = np.array([(-0.19, 0.4), (0.19, 0.4), (0.21, 0.82), (-0.21, 0.82)])
SHORT_HAIR = _arc(0.92, 2.08, 0.62, 0.66, 0, -0.16)
LONG_HAIR = np.concatenate(
    [_arc(1, 2, 0.68, 0.68, 0, -0.14), _arc(0, 0.5, 0.20, 0.20, 0.54, 0.72), _arc(0.5, 1, 0.20, 0.20, -0.54, 0.72)]
)
HAIRLINE = np.concatenate(
    [
        _arc(0.98, 2.02, 0.60, 0.66, 0, -0.12),
        _arc(1.97, 1.35, 0.52, 0.36, -0.02, -0.10),
        _arc(1.3, 1.03, 0.42, 0.30, -0.13, -0.12),
    ]
)
FRINGE = np.concatenate(
    [
        _arc(0.98, 2.02, 0.60, 0.66, 0, -0.12),
        [
            (0.53, -0.14),
            (0.42, -0.22),
            (0.3, -0.20),
            (0.18, -0.26),
            (0.04, -0.21),
            (-0.1, -0.27),
            (-0.24, -0.2),
            (-0.38, -0.24),
            (-0.53, -0.14),
        ],
    ]
)
GLOSS = _arc(1.25, 1.45, 0.46, 0.52, 0, -0.12, 6)
DOME = _arc(1, 2, 0.66, 0.66, 0, -0.30)
CUFF = np.concatenate([_arc(1.03, 1.97, 0.72, 0.16, 0, -0.34), _arc(0.06, 0.94, 0.70, -0.10, 0, -0.16)])
