"""Renders toy_faces: the image as a function of the factors.

Everything is a polygon in face coordinates (see face_shapes.py), moved by the pose and drawn at several times the size;
downsampling makes the edges smooth. Sizes were chosen by eye, so that each attribute is visible at 32 pixels.
"""

import colorsys
from functools import lru_cache
from math import cos, pi, radians, sin

import numpy as np
from PIL import Image, ImageDraw

from shard_data.sources import face_shapes as shapes
from shard_data.sources.face_factors import RED, Face
from shard_data.sources.face_shapes import CIRCLE, LINE

Color = tuple[int, int, int]

SKINS = np.array([(246, 206, 168), (236, 184, 142), (222, 164, 118), (186, 124, 82), (154, 100, 68), (124, 78, 55)])
PALE = np.array([(255, 234, 222), (250, 226, 214)])
HAIRS = {  # darkest, lightest, and behind the head
    "Black_Hair": ((24, 22, 28), (48, 42, 52), (18, 16, 20)),
    "Blond_Hair": ((226, 174, 74), (250, 216, 128), (198, 140, 56)),
    "Brown_Hair": ((84, 46, 26), (122, 70, 38), (62, 34, 20)),
    "Gray_Hair": ((150, 152, 162), (206, 208, 216), (126, 128, 140)),
    RED: ((172, 64, 30), (218, 100, 44), (136, 46, 22)),
}
EYES = np.array([(70, 42, 26), (104, 66, 30), (70, 104, 60), (52, 112, 140), (50, 84, 160)])
INK = (40, 30, 38)


def blend(a: Color, b: Color, t: float) -> Color:
    """From `a` (t = 0) to `b` (t = 1)."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def along(palette: np.ndarray, t: float) -> Color:
    """The color at `t` in [0, 1] of a palette (N, 3)."""
    place = t * (len(palette) - 1)
    low = min(int(place), len(palette) - 2)
    return blend(tuple(palette[low].tolist()), tuple(palette[low + 1].tolist()), place - low)


def hsv(hue: float, saturation: float, value: float) -> Color:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))


class Look:
    """The colors of a face."""

    def __init__(self, face: Face):
        self.skin = along(PALE if "Pale_Skin" in face.present else SKINS, face.skin)
        self.shade = blend(self.skin, (120, 40, 40), 0.22)
        self.blush = blend(self.skin, (240, 66, 78), 0.52)
        self.shine = blend(self.skin, (255, 255, 255), 0.22)
        self.nose = blend(self.skin, (176, 44, 36), 0.36)
        self.nostril = blend(self.skin, (60, 10, 16), 0.6)
        dark, light, behind = HAIRS[face.hair_color]
        self.hair = blend(dark, light, face.hair_shade)
        self.hair_behind = blend(behind, self.hair, 0.2)
        self.hair_light = blend(self.hair, (255, 240, 225), 0.28)
        self.brow = blend(self.hair, (28, 14, 10), 0.68)
        self.beard = blend(self.hair, (40, 20, 12), 0.28)
        self.lip = (206, 24, 62) if "Wearing_Lipstick" in face.present else blend(self.skin, (184, 50, 62), 0.55)
        self.lip_line = blend(self.lip, (60, 10, 20), 0.62)
        self.eye = along(EYES, face.eye_color)
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
        self.origin = (np.add(shapes.PIVOT, face.shift) + 1) * self.half - shapes.PIVOT @ self.matrix

    def place(self, points: np.ndarray, depth: float) -> list[float]:
        """Canvas coordinates. `depth` is the distance in front of the head's axis; turning moves a shape that much."""
        return (points @ self.matrix + (self.origin + (self.turn * depth) * self.matrix[0])).ravel().tolist()

    def fill(self, points: np.ndarray, color: Color, depth: float = 0.0) -> None:
        self.draw.polygon(self.place(points, depth), fill=color)

    def oval(self, x: float, y: float, rx: float, ry: float, color: Color, depth: float = 0.0) -> None:
        self.fill(CIRCLE * (rx, ry) + (x, y), color, depth)

    def line(self, points: np.ndarray, width: float, color: Color, depth: float = 0.0) -> None:
        self.draw.line(self.place(points, depth), fill=color, width=round(width * self.half), joint="curve")

    def band(
        self, x: float, y: np.ndarray, half_width: float, thickness: np.ndarray, color: Color, depth: float
    ) -> None:
        """A stroke over x +- half_width whose middle runs through `y` (13,), `thickness` (13,) from top to bottom."""
        across = x + half_width * LINE
        upper, lower = np.stack([across, y - thickness / 2], 1), np.stack([across, y + thickness / 2], 1)
        self.fill(np.concatenate([upper, lower[::-1]]), color, depth)


def draw_face(face: Face, size: int) -> np.ndarray:
    """The image of a face, uint8 (size, size, 3)."""
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
    """Brighten the side from which the light comes."""
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
        pen.fill(shapes.LONG_HAIR, look.hair_behind)
    else:
        pen.fill(shapes.SHORT_HAIR, look.hair_behind)


def _body(pen: Pen, look: Look) -> None:
    pen.oval(0, 1.14, 0.86, 0.40, look.clothes)
    pen.oval(0, 0.80, 0.29, 0.15, look.collar)
    pen.oval(0, 0.78, 0.22, 0.13, look.shade)
    pen.fill(shapes.NECK, look.shade)


def _ears(pen: Pen, face: Face, look: Look) -> None:
    for side in (-1, 1):
        pen.oval(side * 0.55, 0.06, 0.10, 0.14, look.skin)
        pen.oval(side * 0.565, 0.07, 0.05, 0.08, look.shade)
        if "Wearing_Earrings" in face.present:
            pen.oval(side * 0.585, 0.27, 0.085, 0.085, (150, 90, 10))
            pen.oval(side * 0.585, 0.265, 0.062, 0.062, (255, 214, 60))


def _skin(pen: Pen, face: Face, look: Look) -> None:
    pen.fill(shapes.FACE, blend(look.skin, look.shade, 0.55))
    pen.fill(shapes.FACE * (0.95, 0.97) + (0.024 * face.light, -0.012), look.skin)
    if "Rosy_Cheeks" in face.present:
        for side in (-1, 1):
            pen.oval(side * 0.35, 0.235, 0.12, 0.085, look.blush, 0.08)


def _nose(pen: Pen, face: Face, look: Look) -> None:
    if "Big_Nose" not in face.present:
        pen.oval(0, 0.175, 0.055, 0.042, look.shade, 0.14)
        return
    pen.oval(0, 0.185, 0.155, 0.11, look.nose, 0.14)
    pen.oval(-0.015, 0.155, 0.10, 0.06, look.shine, 0.15)
    for side in (-1, 1):
        pen.oval(side * 0.06, 0.245, 0.032, 0.024, look.nostril, 0.14)


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
    x, y, depth = side * 0.245, 0.05, 0.09
    tall = 0.065 if "Narrow_Eyes" in face.present else 0.145
    pen.oval(x, y, 0.135, tall, (255, 255, 255), depth)
    pen.oval(x, y + 0.005, 0.100, min(0.118, tall), look.eye, depth + 0.03)
    pen.oval(x, y + 0.005, 0.058, min(0.070, tall * 0.9), INK, depth + 0.03)
    pen.oval(x - 0.034, y - 0.042 if tall > 0.1 else y - 0.02, 0.032, 0.034, (255, 255, 255), depth + 0.03)
    pen.band(x, y - tall * np.sqrt(1 - (0.98 * LINE) ** 2), 0.145, 0.045 + 0 * LINE, INK, depth)
    bushy = "Bushy_Eyebrows" in face.present
    arch = y - 0.20 - 0.035 * (1 - LINE**2)
    pen.band(x, arch, 0.17 if bushy else 0.13, (0.12 if bushy else 0.040) * (1 - 0.6 * LINE**4), look.brow, depth)


def _hair_in_front(pen: Pen, face: Face, look: Look) -> None:
    front = shapes.FRINGE if "Bangs" in face.present and "Wearing_Hat" not in face.present else shapes.HAIRLINE
    pen.fill(front * (0.93, 1) + (0, 0.035), look.shade)  # its shadow on the forehead
    pen.fill(front, look.hair)
    pen.line(shapes.GLOSS, 0.05, look.hair_light)


def _glasses(pen: Pen) -> None:
    for side in (-1, 1):
        pen.line(np.concatenate([CIRCLE, CIRCLE[:2]]) * (0.20, 0.19) + (side * 0.245, 0.055), 0.048, INK, 0.12)
        pen.line(np.array([(side * 0.44, 0.0), (side * 0.58, -0.02)]), 0.045, INK, 0.06)
    pen.line(np.array([(-0.06, 0.02), (0.06, 0.02)]), 0.045, INK, 0.12)


def _hat(pen: Pen, look: Look) -> None:
    pen.fill(shapes.DOME, look.hat)
    pen.fill(shapes.CUFF, look.cuff)
