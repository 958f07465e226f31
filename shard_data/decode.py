"""Originals as people have them, made into plain RGB pictures: each converted rightly or refused by name.

- EXIF orientation is honored, in every format that has it. An EXIF block that cannot be read has none.
- Transparency (alpha, or a transparent color) is laid over white. CMYK, YCbCr, gray and palettes become RGB as Pillow
  does it; 16-bit gray is scaled to 8 bits (65535 is 255), rounded.
- Refused: animations and files of several pages, more pixels than MAX_PIXELS, truncated or broken files, and modes
  whose range or meaning the file does not tell (32-bit integers, floats, Lab, HSV). Of an MPO, a camera's JPEG with
  further views behind it, the main picture is taken.

Where simplejpeg is installed it decodes the plain JPEGs, in half the time and to the same pixels as Pillow.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from shard_data.errors import BadImage
from shard_data.geometry import Box

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
)  # MPO opens as JPEG; not EPS, for which Pillow starts Ghostscript
MAX_PIXELS = 80_000_000
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
ORIENTATION = 0x0112
TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHAT_WAS_DONE = {"alpha": "over white", "orientation": "EXIF"}
"""For the `transform` of sources whose originals may be of any kind."""


class Cut(NamedTuple):
    """A part of pictures of one size."""

    size: tuple[int, int]
    box: Box


def read_rgb(data: bytes, name: str, cut: Cut | None = None) -> Image.Image:
    """The picture in the bytes of an image file, upright, as mode RGB, or what `cut` leaves of it.

    Raises BadImage, which bears `name`, also for a picture of another size than that of the cut.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata that is not used here, and size, checked below
            return _read(data, cut)
    except Unsuitable as error:
        raise BadImage(name, str(error)) from None
    except Exception as error:  # decoders fed with broken bytes raise nearly anything
        raise BadImage(name, f"cannot be decoded ({_reason(error)})") from None


class Unsuitable(Exception):
    """A file that Pillow can read and we must refuse."""


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format, or broken"  # Pillow's own text holds an address in memory
    return str(error) or type(error).__name__


def _read(data: bytes, cut: Cut | None) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Unsuitable(f"{image.width} x {image.height} pixels; more than {MAX_PIXELS:,} are refused")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise Unsuitable(f"{image.format} with {image.n_frames} frames or pages; give one picture per file")
    array = _fast_jpeg(data, image)
    loaded = _to_rgb(image) if array is None else None
    orientation = _orientation(image)  # not before, as for some formats it loads the image
    if cut and array is not None and orientation not in TURN and image.size == cut.size:
        left, top, right, bottom = cut.box
        return Image.fromarray(array[top:bottom, left:right])  # as below, without a copy of the whole
    rgb = loaded or Image.fromarray(array)
    rgb = rgb.transpose(TURN[orientation]) if orientation in TURN else rgb
    return _cut(rgb, cut) if cut else rgb


def _cut(rgb: Image.Image, cut: Cut) -> Image.Image:
    if rgb.size != cut.size:
        raise Unsuitable(f"{rgb.width} x {rgb.height} pixels, where {cut.size[0]} x {cut.size[1]} are expected")
    return rgb.crop(cut.box)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # metadata beside the point is often broken; the picture is what counts
        return 1


def _fast_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """A plain YCbCr JPEG by simplejpeg, uint8 (H, W, 3); anything else, and what it dislikes, is left to Pillow."""
    if simplejpeg is None or image.format != "JPEG" or image.mode != "RGB":
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if colors != "YCbCr" or (width, height) != image.size:
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in SIXTEEN_BIT:
        return _sixteen_bit(image)
    if image.mode not in PLAIN:
        raise Unsuitable(f"pixels of mode {image.mode}, whose range or meaning is not known; convert it to 8-bit RGB")
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode in ("L", "RGB") and max(key if isinstance(key, tuple) else (key or 0,)) > 255:
        raise Unsuitable("16-bit colors with one of them transparent, which 8 bits cannot tell from its neighbours")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return white.convert("RGB")


def _sixteen_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    gray = ((values + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray).convert("RGB")
