"""Image files and Pillow images, converted to the size and channels of a model's training images."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 80_000_000
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # not EPS, for which Pillow starts Ghostscript
FILTERS = {name.lower(): Image.Resampling[name] for name in ("BILINEAR", "BICUBIC", "LANCZOS", "BOX", "HAMMING")}
ALIGNED = (178, 218)  # size of CelebA's aligned faces: a crop given in pixels applies to them alone

Images = Tensor | Image.Image | Sequence[Image.Image]
"""A batch (B, C, H, W) as a tensor, or one or several Pillow images."""


def to_tensor(images: Images, image_shape: tuple[int, int, int]) -> Tensor:
    """Pillow images as uint8 (B, C, H, W), upright and without transparency; a tensor is returned unchanged.

    Raises ValueError for images of another size, which are not resized, and for anything else.
    """
    if isinstance(images, Tensor):
        return images
    images = [images] if isinstance(images, Image.Image) else images
    if not isinstance(images, Sequence) or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"images are a tensor (B, C, H, W) or Pillow images, not {type(images).__name__}")
    if not images:
        raise ValueError("no images were given")
    channels, height, width = image_shape
    upright = [_over_white(ImageOps.exif_transpose(image)) for image in images]
    for image in upright:
        if image.size != (width, height):
            raise ValueError(f"a Pillow image is {image.width}x{image.height}; resize it to {width}x{height}")
    return torch.cat([_pixels(image.convert("L" if channels == 1 else "RGB")) for image in upright])


def open_picture(
    path: Path, image_shape: tuple[int, int, int], transform: Mapping[str, Any] | None = None
) -> tuple[Tensor, str]:
    """uint8 (1, C, H, W), and what was done to the picture. One of the right size is not changed.

    Otherwise the largest centered square is cut out and resized; an aligned face of CelebA is cropped as the shard
    set's `transform` says. Transparency becomes white, and EXIF's orientation is applied. Raises ValueError for a file
    that is not a picture, or a huge one.
    """
    channels, height, width = image_shape
    image = read_picture(path).convert("L" if channels == 1 else "RGB")
    transform = dict(transform or {})
    filter = FILTERS.get(str(transform.get("filter")), Image.Resampling.BILINEAR)
    size, done = image.size, "unchanged"
    if size != (width, height):
        left, top, right, bottom = box = crop_box(size, transform)
        image = image.crop(box).resize((width, height), filter)
        done = (
            f"{size[0]}x{size[1]}: cropped to {right - left}x{bottom - top} at ({left}, {top}), "
            f"resized to {width}x{height} ({filter.name.lower()})"
        )
    return _pixels(image), done


def _pixels(image: Image.Image) -> Tensor:
    """uint8 (1, C, H, W) of an image in mode L or RGB."""
    pixels = np.atleast_3d(np.array(image)).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))[None]


def crop_box(size: tuple[int, int], transform: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): the set's own crop for aligned faces, else the largest centered square."""
    if size == ALIGNED and _is_box(transform.get("crop"), size):
        return tuple(transform["crop"])
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def _is_box(box: Any, size: tuple[int, int]) -> bool:
    """Whether `box`, read from a manifest, is a part of an image of this size."""
    if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(value, int) for value in box):
        return False
    left, top, right, bottom = box
    return 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def read_picture(path: Path) -> Image.Image:
    """The picture, upright, without transparency. Raises ValueError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata and size; size is checked below
            image = Image.open(path, formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; more than {MAX_PIXELS:,} are refused")
            image.load()
            return _over_white(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such picture") from None
    except Exception as error:  # decoders raise exceptions of many types for broken files
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "not an image of a known format, or broken" if unknown else error
        raise ValueError(f"{path}: cannot be used as a picture ({reason})") from None


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"pixels of mode {image.mode}; convert it to 8-bit RGB")
    if "transparency" not in image.info and image.mode not in ("LA", "PA", "RGBA"):
        return image
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return white.convert("RGB")
