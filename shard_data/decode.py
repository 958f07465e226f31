"""Decodes image files to RGB.

- EXIF orientation is applied, for every format that has it. An unreadable EXIF block is ignored.
- Transparency (alpha, or a transparent color) is composited over white. Pillow converts CMYK, YCbCr, gray and palettes
  to RGB. 16-bit gray is scaled to 8 bits (65535 becomes 255) and rounded.
- Refused with BadImage: animations and files with several pages, more pixels than MAX_PIXELS, truncated or corrupt
  files, and modes whose value range is not defined (32-bit integers, floats, Lab, HSV). Of an MPO file (a camera's JPEG
  with further views) the first image is used.

simplejpeg, if it is installed, decodes YCbCr JPEGs in half the time and to the same pixels as Pillow.
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

# MPO opens as JPEG. Not EPS, for which Pillow starts Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 80_000_000
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
ORIENTATION = 0x0112
TRANSPOSE = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TRANSFORM = {"alpha": "over white", "orientation": "EXIF"}
"""For the `transform` of sources that read image files of any kind."""


class Crop(NamedTuple):
    """A box to cut out of images of one size, (width, height)."""

    size: tuple[int, int]
    box: Box


def read_rgb(data: bytes, name: str, crop: Crop | None = None) -> Image.Image:
    """Decode an image file to an upright image of mode RGB, or the part of it that `crop` selects.

    Raises BadImage with `name` for a file that cannot be decoded, or an image of another size than `crop.size`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: unused metadata, and the size, which is checked here
            return _read(data, crop)
    except Unsuitable as error:
        raise BadImage(name, str(error)) from None
    except Exception as error:  # decoders raise nearly any exception for corrupt bytes
        raise BadImage(name, f"cannot be decoded ({_reason(error)})") from None


class Unsuitable(Exception):
    """A file that Pillow can read, but not unambiguously."""


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format, or corrupt"  # Pillow's own text holds a memory address
    return str(error) or type(error).__name__


def _read(data: bytes, crop: Crop | None) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Unsuitable(f"{image.width} x {image.height} pixels; more than {MAX_PIXELS:,} are refused")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise Unsuitable(f"{image.format} with {image.n_frames} frames or pages; give one image per file")
    array = _fast_jpeg(data, image)
    loaded = _to_rgb(image) if array is None else None
    orientation = _orientation(image)  # not earlier: for some formats this loads the image
    if crop and array is not None and orientation not in TRANSPOSE and image.size == crop.size:
        left, top, right, bottom = crop.box
        return Image.fromarray(array[top:bottom, left:right])  # the same as below without copying the whole image
    rgb = loaded or Image.fromarray(array)
    rgb = rgb.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else rgb
    return _cropped(rgb, crop) if crop else rgb


def _cropped(rgb: Image.Image, crop: Crop) -> Image.Image:
    if rgb.size != crop.size:
        raise Unsuitable(f"{rgb.width} x {rgb.height} pixels instead of {crop.size[0]} x {crop.size[1]}")
    return rgb.crop(crop.box)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # corrupt metadata is common, and the image may still be good
        return 1


def _fast_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """Decode a YCbCr JPEG with simplejpeg to uint8 (H, W, 3). None for any other file, and for one that it refuses."""
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
        raise Unsuitable(f"pixels of mode {image.mode}, whose value range is not defined; convert it to 8-bit RGB")
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode in ("L", "RGB") and max(key if isinstance(key, tuple) else (key or 0,)) > 255:
        raise Unsuitable("a transparent 16-bit color, which is ambiguous at 8 bits; convert it to 8-bit RGB")
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
