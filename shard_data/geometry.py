"""Crops and resizing. Each has a name, which the manifest records."""

from PIL import Image

from shard_data.errors import DataError

FILTERS = {name.lower(): Image.Resampling[name] for name in ("BILINEAR", "BICUBIC", "LANCZOS", "BOX", "HAMMING")}
Box = tuple[int, int, int, int]


def check_size(size: int, smallest: int, largest: int) -> None:
    if not smallest <= size <= largest:
        raise DataError(f"size {size}: must be from {smallest} to {largest} pixels")


def check_filter(name: str) -> None:
    if name not in FILTERS:
        raise DataError(f"filter {name!r}: must be one of {', '.join(FILTERS)}")


def center_box(width: int, height: int, side: int) -> Box:
    """(left, top, right, bottom) of the central square; halves are rounded to even, as in torchvision's CenterCrop."""
    left, top = round((width - side) / 2), round((height - side) / 2)
    return (left, top, left + side, top + side)


def resize(image: Image.Image, size: tuple[int, int], filter: str) -> Image.Image:
    """Pillow's antialiased resize. An image that already has the size is returned unchanged."""
    return image if image.size == size else image.resize(size, FILTERS[filter])


def shorter_side_then_center(image: Image.Image, size: int, filter: str) -> Image.Image:
    """Resize the shorter side to `size`, then crop the center: torchvision's Resize and CenterCrop."""
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    return resize(image, (width, height), filter).crop(center_box(width, height, size))


def center_then_resize(image: Image.Image, size: int, filter: str) -> Image.Image:
    """Crop the largest central square, then resize it."""
    return resize(image.crop(center_box(*image.size, min(image.size))), (size, size), filter)


FITS = {"resize-crop": shorter_side_then_center, "crop-resize": center_then_resize}
